"""Compare ways to spend few parameters on attention, on the same data, offline.

    python examples/compare_attention.py
    python examples/compare_attention.py --quick         # whether everything runs; the accuracies mean nothing

The task: which of twenty libraries does this docstring come from, its name being masked? Two settings, each with one
training loop and one kind of head for all its rows:

- from scratch: word embedding → bidirectional GRU → a pooling by attention → MLP;
- MiniLM: a pretrained encoder → a pooling → MLP. The encoder is frozen, or its attention projections are trained
  through LoRA, through WaRA, or factorised. The rest of the encoder is frozen in all rows.

Seeds decide initial values and the order of texts; texts and splits are the same for all of them, so the intervals are
about training, not about other data. Prints a table, and writes compare_attention.json with three pictures: accuracy
against parameters, time of a training step against sequence length, and which words LAMA's heads look at.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import torch
from attention_figures import draw_accuracies, draw_attention, draw_step_times
from attention_models import (
    FROZEN,
    MIXTURES,
    SCRATCH,
    TRANSFORMER_HEADS,
    TUNED,
    EncoderClassifier,
    Row,
    all_rows,
    encoder_states,
    frozen_encoder,
)
from attention_texts import Split, subword_splits, word_splits, words_of
from docstring_data import LabelledText, load_docstrings
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats
from study_options import make_folder, stop
from torch import Tensor, nn

from wara_peft.attention import LinformerAttention, LowRankMultiheadAttention, orthogonality_penalty

BATCH_SIZE = 16
MAX_LENGTH = 512
STEP_WIDTH, STEP_RANK, STEP_MIXTURES = 256, 32, 256
STEP_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
QUICK_SIZES = {"train": 16, "test": 8}


# 1. Options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="runs of each row (default: 5)")
    add("--epochs", type=int, default=8, help="passes over the training texts from scratch (default: 8)")
    add("--encoder-epochs", type=int, default=2, help="passes with MiniLM, frozen or not (default: 2)")
    add("--max-per-class", type=int, default=60, help="docstrings of each library (default: 60)")
    add("--max-length", type=int, default=32, help="tokens that are read of each text (default: 32)")
    add("--output", type=Path, default=Path("compare_attention_output"), help="folder (default: %(default)s)")
    add("--quick", action="store_true", help="two seeds and one epoch on a few texts, and short sequences")
    args = parser.parse_args()
    for option, value, least in (
        ("--seeds", args.seeds, 2),  # or there is no interval
        ("--epochs", args.epochs, 1),
        ("--encoder-epochs", args.encoder_epochs, 1),
        ("--max-length", args.max_length, MIXTURES),
    ):
        if value < least:
            stop(f"{option} {value} must be at least {least}")
    if args.max_length > MAX_LENGTH:
        stop(f"--max-length {args.max_length} must be at most {MAX_LENGTH}, which is what MiniLM can read")
    if args.quick:
        args.seeds, args.epochs, args.encoder_epochs = 2, 1, 1
    make_folder("--output", args.output)
    return args


# 2. Training and measuring


def train(model: nn.Module, split: Split, row: Row, epochs: int, seed: int, advance: Callable[[], None]) -> float:
    """Train what requires a gradient; return the seconds."""
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    steps = epochs * -(-len(split.labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, row.learning_rate, total_steps=steps + 1)
    start = time.perf_counter()
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(split.labels), generator=generator)
        for inputs, padding, labels in split.batches(BATCH_SIZE, order):
            logits, weights = model(inputs, padding, need_weights=row.penalty > 0)
            loss = nn.functional.cross_entropy(logits, labels)
            if row.penalty:
                loss = loss + row.penalty * orthogonality_penalty(weights)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            advance()
    return time.perf_counter() - start


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Return the accuracy, and the tokens (without padding) that were classified in a second.

    States that were computed before count with the seconds that they took.
    """
    model.eval()
    right, start = 0, time.perf_counter()
    for inputs, padding, labels in split.batches(2 * BATCH_SIZE, torch.arange(len(split.labels))):
        right += int((model(inputs, padding)[0].argmax(1) == labels).sum())
    return right / len(split.labels), split.tokens / (split.seconds + time.perf_counter() - start)


@torch.no_grad()
def encoded(encoder: nn.Module, split: Split, advance: Callable[[], None]) -> Split:
    """The split with the frozen encoder's states (N, T, d) for inputs."""
    start = time.perf_counter()
    states = torch.zeros(*split.inputs.shape, encoder.config.hidden_size)
    rows = torch.arange(len(split.labels))
    for part, (tokens, padding, _) in zip(rows.split(BATCH_SIZE), split.batches(BATCH_SIZE, rows), strict=True):
        states[part, : tokens.shape[1]] = encoder_states(encoder, tokens, padding)
        advance()
    return Split(states, split.padding, split.labels, time.perf_counter() - start)


def step_times(lengths: tuple[int, ...], rounds: int, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Median seconds of forward and backward by length; the attentions take turns, so that they share slow moments."""
    modules = {
        "full": nn.MultiheadAttention(STEP_WIDTH, TRANSFORMER_HEADS, batch_first=True),
        "low-rank": LowRankMultiheadAttention(STEP_WIDTH, TRANSFORMER_HEADS, STEP_RANK),
        "Linformer": LinformerAttention(
            STEP_WIDTH, TRANSFORMER_HEADS, max(*lengths, STEP_MIXTURES), STEP_MIXTURES, sharing="headwise"
        ),
    }
    result = []
    for length in lengths:
        states = torch.randn(1, length, STEP_WIDTH, requires_grad=True)
        seconds: dict[str, list[float]] = {name: [] for name in modules}
        for round_ in range(rounds + 1):
            for name, module in modules.items():
                start = time.perf_counter()
                module(states, states, states, need_weights=False)[0].sum().backward()
                if round_:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
            advance()
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        # The median of the rounds' own ratios: a slow moment of the machine meets both sides of one.
        ratio = {
            name: statistics.median(a / b for a, b in zip(values, seconds["full"], strict=True))
            for name, values in seconds.items()
        }
        result.append({"length": length, "seconds": medians, "ratio": ratio})
    return result


def summary(row: Row) -> dict[str, Any]:
    """One row of the JSON file; the interval is Student's, over seeds."""
    runs = len(row.accuracies)
    return {
        "setting": row.setting,
        "model": row.name,
        **row.parameters,
        "accuracy_mean": statistics.mean(row.accuracies),
        "accuracy_interval": float(stats.t.ppf(0.975, runs - 1)) * statistics.stdev(row.accuracies) / runs**0.5,
        "accuracies": row.accuracies,
        "training_seconds": statistics.mean(row.seconds),
        "tokens_per_second": statistics.median(row.tokens_per_second),
    }


def parameter_counts(model: nn.Module, attention: nn.Module) -> dict[str, int]:
    return {
        "attention_parameters": trained_parameters(attention),
        "trained_parameters": trained_parameters(model),
        "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def trained_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


# 3. What is shown


@torch.no_grad()
def attended_texts(
    model: nn.Module, split: Split, texts: tuple[LabelledText, ...], label_names: tuple[str, ...], max_length: int
) -> list[tuple[list[str], str, str, Tensor]]:
    """Words, label, prediction and LAMA's weights (heads, words) of the first three held-out texts."""
    model.eval()
    logits, weights = model(split.inputs[:3], split.padding[:3], need_weights=True)
    shown = []
    for (text, label), prediction, weight in zip(texts[:3], logits.argmax(1).tolist(), weights, strict=True):
        words = words_of(text, max_length)
        shown.append((words, label_names[label], label_names[prediction], weight[:, : len(words)]))
    return shown


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("setting", "model", title="Docstring classification, test split")
    for column in ("attention", "trained", "total", "accuracy", "train s", "tokens/s"):
        table.add_column(column, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            row["setting"],
            row["model"],
            f"{row['attention_parameters']:,}",
            f"{row['trained_parameters']:,}",
            f"{row['total_parameters']:,}",
            f"{row['accuracy_mean']:.3f} ± {row['accuracy_interval']:.3f}",
            f"{row['training_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            end_section=following is None or following["setting"] != row["setting"],
        )
    console.print(table)


def main() -> None:
    args = parse_arguments()
    started = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 140)  # a file has no width for the table to fit
    try:
        docstrings = load_docstrings(max_per_class=args.max_per_class)
    except (RuntimeError, ValueError) as error:
        stop(str(error))
    data = {"train": docstrings.train, "test": docstrings.test}
    if args.quick:
        data = {name: texts[: QUICK_SIZES[name]] for name, texts in data.items()}
    num_classes = len(docstrings.label_names)
    words, vocab_size = word_splits(data, args.max_length)
    subwords = subword_splits(data, args.max_length)
    frozen = frozen_encoder().eval()
    rows = all_rows(vocab_size, num_classes, args.max_length)
    lengths, rounds = (STEP_LENGTHS[:2], 1) if args.quick else (STEP_LENGTHS, 5)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    epochs = {SCRATCH: args.epochs, FROZEN: args.encoder_epochs, TUNED: args.encoder_epochs}
    batches = -(-len(data["train"]) // BATCH_SIZE)
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        timing = progress.add_task("step times", total=len(lengths) * (rounds + 1))
        encoding = progress.add_task(
            "states of MiniLM", total=sum(-(-len(texts) // BATCH_SIZE) for texts in data.values())
        )
        training = {
            setting: progress.add_task(
                setting, total=args.seeds * sum(row.setting == setting for row in rows) * passes * batches
            )
            for setting, passes in epochs.items()
        }
        measured = step_times(lengths, rounds, partial(progress.advance, timing))
        states = {
            name: encoded(frozen, split, partial(progress.advance, encoding)) for name, split in subwords.items()
        }
        splits = {SCRATCH: words, FROZEN: states, TUNED: subwords}
        shown = None
        # Seeds outside, so that no row has the machine's quiet hour to itself.
        for seed in range(args.seeds):
            for row in rows:
                setting = row.setting
                torch.manual_seed(seed)
                model = row.build()
                advance = partial(progress.advance, training[setting])
                row.seconds.append(train(model, splits[setting]["train"], row, epochs[setting], seed, advance))
                accuracy, speed = evaluate(model, splits[setting]["test"])
                row.accuracies.append(accuracy)
                row.tokens_per_second.append(speed)
                whole = EncoderClassifier(frozen, model) if setting == FROZEN else model
                row.parameters = parameter_counts(whole, row.attention(whole))
                if shown is None:  # the first row is LAMA's
                    shown = attended_texts(model, words["test"], data["test"], docstrings.label_names, args.max_length)

    result = {
        "options": {name: value for name, value in vars(args).items() if name != "output"},
        "texts": {name: len(texts) for name, texts in data.items()},
        "classes": num_classes,
        "encoding_seconds": states["train"].seconds,
        "rows": [summary(row) for row in rows],
        "step_times": measured,
        "step_settings": {"width": STEP_WIDTH, "heads": TRANSFORMER_HEADS, "rank": STEP_RANK, "k": STEP_MIXTURES},
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "total_seconds": time.perf_counter() - started,
    }
    (args.output / "compare_attention.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_accuracies(result["rows"], args.output / "accuracy.png")
    draw_step_times(measured, args.output / "step_time.png")
    draw_attention(shown, args.output / "attention.png")
    print_table(result["rows"], console)
    console.print(
        f"The states of the frozen encoder took {states['train'].seconds:.1f} s more, once for all its rows."
    )
    console.print(f"Saved compare_attention.json, accuracy.png, step_time.png and attention.png in {args.output}")


if __name__ == "__main__":
    main()
