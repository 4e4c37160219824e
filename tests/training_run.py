"""A short `Trainer` run in a process of its own, for the tests of checkpoints: it can kill itself and resume.

python -m tests.training_run OUTPUT_DIR [--kill-at-step N] [--resume] [--as-lora] [--kill-after-save N] [--inside-lora]

With --inside-lora the adapter is a reparametrised LoRA.
Writes the logged losses to OUTPUT_DIR/losses.json and the final logits to OUTPUT_DIR/logits.pt, and saves the adapter
in OUTPUT_DIR/adapter; with --load it loads that adapter instead, and checks that the logits are the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from wara_peft import SaveAsLora, WaRAConfig, reparametrize_lora

TOKENS = torch.arange(1, 25).view(4, 6)


class KillAt(TrainerCallback):
    """End the process as an outside SIGKILL would, after a step, or once its checkpoint is saved."""

    def __init__(self, step: int | None, saved_step: int | None) -> None:
        self.step = step
        self.saved_step = saved_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.saved_step:
            os.kill(os.getpid(), signal.SIGKILL)


def base_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, num_labels=3
    )
    return BertForSequenceClassification(config)


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (48, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in tokens]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def adapted(inside_lora: bool) -> PeftModel:
    settings = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    if not inside_lora:
        return get_peft_model(
            base_model(), WaRAConfig(r=2, wavelet="db2", wara_dropout=0.1, wara_alpha=16, **settings)
        )
    model = get_peft_model(base_model(), LoraConfig(r=8, lora_dropout=0.1, lora_alpha=16, **settings))
    reparametrize_lora(model, wavelet="db2")
    return model


def train(output_dir: Path, callbacks: list[TrainerCallback], resume: bool, inside_lora: bool) -> None:
    model = adapted(inside_lora)
    arguments = TrainingArguments(
        output_dir=str(output_dir / "checkpoints"),
        per_device_train_batch_size=8,
        num_train_epochs=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    (output_dir / "losses.json").write_text(json.dumps(losses))
    torch.save(logits(model), output_dir / "logits.pt")
    model.save_pretrained(output_dir / "adapter")


def load(output_dir: Path) -> None:
    model = PeftModel.from_pretrained(base_model(), output_dir / "adapter")
    assert torch.equal(logits(model), torch.load(output_dir / "logits.pt"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--kill-at-step", type=int)
    parser.add_argument("--kill-after-save", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--as-lora", action="store_true")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--inside-lora", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.load:
        load(options.output_dir)
    else:
        callbacks = [
            KillAt(options.kill_at_step, options.kill_after_save),
            *([SaveAsLora()] if options.as_lora else []),
        ]
        train(options.output_dir, callbacks, options.resume, options.inside_lora)
