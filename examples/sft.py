"""Fine-tune a language model with TRL's `SFTTrainer`: WaRA, or a LoRA that is trained in the wavelet domain.

    python examples/sft.py               # peft_config=WaRAConfig(...)
    python examples/sft.py --lora        # peft_config=LoraConfig(...), then reparametrize_lora

Model and pairs are those of quickstart.py. The loss is that of completions only, which `SFTTrainer` does for data with
the columns `prompt` and `completion`. Both runs have as many parameters. The second one saves a LoRA, which loads
without this package.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import smollm2
import torch
from chat_pairs import encode, loss_per_token, prompt_and_answer
from datasets import Dataset
from message_data import language_name, load_messages
from peft import LoraConfig
from study_options import stop
from trl import SFTConfig, SFTTrainer

from wara_peft import WaRAConfig, reparametrize_lora

TEST_PAIRS = 72


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=smollm2.NAME, help="a local folder or a GGUF file (default: %(default)s)")
    add("--language", default="de", help="of Django's messages (default: %(default)s)")
    add("--lora", action="store_true", help="train the factors of a LoRA by their wavelet coefficients")
    add("--steps", type=int, default=48, help="training steps of 12 pairs each (default: %(default)s)")
    add("--output-dir", type=Path, default=Path("sft_output"), help="default: %(default)s")
    args = parser.parse_args()

    try:
        pairs = load_messages(args.language)
        model, tokenizer = smollm2.load_model(args.model), smollm2.load_tokenizer(args.model)
        language = language_name(args.language)
        texts = [prompt_and_answer(tokenizer, pair, language) for pair in pairs.train]
    except (OSError, RuntimeError, ValueError) as error:
        stop(str(error))
    test = encode(tokenizer, pairs.test[:TEST_PAIRS], language)

    # R of the LoRA is that of the adapter: with half of a LoRA's parameters once it is reparametrised.
    config = WaRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = LoraConfig(r=config.total_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            learning_rate=2e-3,
            lr_scheduler_type="linear",
            per_device_train_batch_size=12,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts]),
        processing_class=tokenizer,
        peft_config=lora if args.lora else config,
    )
    if args.lora:
        print(reparametrize_lora(trainer.model))
    trainer.model.print_trainable_parameters()
    before = loss_per_token(trainer.model, tokenizer, test)
    trainer.train()
    after = loss_per_token(trainer.model, tokenizer, test)
    trainer.save_model(str(args.output_dir / "adapter"))
    print(f"Loss of {len(test)} held-out messages: {after:.2f} nats a token, before {before:.2f}")


if __name__ == "__main__":
    main()
