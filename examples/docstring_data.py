"""A text classification data set that needs no network: which library wrote this docstring?

The texts are the docstrings of packages that are installed anyway, so the data set is built, not downloaded. Sources
are parsed with `ast` and never imported: a package whose optional dependencies are missing, or whose import prints,
opens a window or takes seconds, is read like any other. Each text is the first words of one docstring, with the names
of all the libraries masked.

The same package versions and seed give the same data set in every process. Other versions give other texts, so
accuracies are comparable within one environment only.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

# The label, which is also the dotted path of the sources: the distribution that has them, None for Python's own.
LIBRARIES: dict[str, str | None] = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "asyncio": None,
    "datasets": "datasets",
    "email": None,
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "logging": None,
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "peft": "peft",
    "scipy.optimize": "scipy",
    "scipy.signal": "scipy",
    "scipy.stats": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch.nn": "torch",
    "transformers": "transformers",
}

MASK = "lib"

# Masked wherever they stand, inside identifiers too: `is_torch_available` and `NumpyArray` give the label away.
_NAMES = (
    "pytorch|torch|scipy|numpy|pandas|networkx|scikit[- ]?learn|scikit|sklearn|matplotlib|pyplot|sympy|pillow|asyncio"
    "|email|transformers|datasets|accelerate|peft|hugging[- _]?face|🤗|jinja2?"
)
# Masked only between non-letters: each is part of other words ("pil" of "compile") or is an everyday word.
_SHORT_NAMES = "np|pd|plt|mpl|nx|nn|pil|sp|hf|hub|stats|signal|optimize|logging"
_LIBRARY_NAME = re.compile(rf"{_NAMES}|(?<![a-z])(?:{_SHORT_NAMES})(?![a-z])", re.IGNORECASE)

# `models` is thousands of files of transformers that repeat one another; the others are not the library's own voice.
_SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "externals", "models"}
# Parsing is what takes the time; this many files hold several times the texts that are kept.
_MAX_FILES = 100
_MIN_WORDS = 8
_MIN_PER_CLASS = 100
_VALIDATION_SHARE, _TEST_SHARE = 2 / 15, 3 / 15


class LabelledText(NamedTuple):
    """One example: a masked text and the index of its library in `DocstringData.label_names`."""

    text: str
    label: int


@dataclass(frozen=True)
class DocstringData:
    """The data set, split once; no text is in two splits.

    The splits are plain tuples, so that this module needs nothing but the standard library: a training loop of one's
    own takes them as they are, and `datasets.Dataset.from_list([e._asdict() for e in data.train])` is one line.

    Attributes:
        label_names: the libraries; the label `i` means `label_names[i]`.
        train: two thirds of each class, in random order.
        validation: two fifteenths of each class, to choose hyper-parameters with.
        test: a fifth of each class.
    """

    label_names: tuple[str, ...]
    train: tuple[LabelledText, ...]
    validation: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]


def mask_library_names(text: str) -> str:
    """Return `text` with white space normalised and each library's name, in any case, replaced by `MASK`."""
    return _LIBRARY_NAME.sub(MASK, " ".join(text.split()))


def _source_files(dotted_path: str) -> list[Path]:
    """Return the Python files of a package or subpackage, sorted; an empty list where it is not installed."""
    top_level, *inner = dotted_path.split(".")
    # Only the top-level name is looked up: `find_spec` imports the parents of a dotted one.
    spec = importlib.util.find_spec(top_level)
    if spec is None or spec.submodule_search_locations is None:
        return []
    files = []
    for location in spec.submodule_search_locations:
        folder = Path(location, *inner)
        files += [path for path in folder.rglob("*.py") if not _SKIPPED_FOLDERS & {*path.relative_to(folder).parts}]
    return sorted(files)


@cache
def _docstrings(path: Path) -> tuple[str, ...]:
    """Return the docstrings of the public functions, methods and classes that one file defines."""
    return tuple(_read_docstrings(path))


def _read_docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in somebody's source is not our reader's business
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and test inputs for parsers carry the suffix too
        return
    # Only statements are visited: `ast.walk` would go through every expression too, and take longer than the parser.
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name.startswith("_"):
                continue
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        for field in ("body", "orelse", "handlers", "finalbody"):
            pending += getattr(node, field, [])


def _texts_of(library: str, num_words: int, rng: random.Random) -> list[str]:
    """Return the masked texts of one library, sorted, each once (case does not count)."""
    files = _source_files(library)
    if len(files) > _MAX_FILES:
        files = rng.sample(files, _MAX_FILES)
    texts: dict[str, str] = {}
    for path in files:
        for docstring in _docstrings(path):
            # Masking can only make two words one, so twice the words are enough, and the rest need not be searched.
            words = mask_library_names(" ".join(docstring.split()[: 2 * num_words])).split()[:num_words]
            if len(words) >= min(_MIN_WORDS, num_words):
                text = " ".join(words)
                texts.setdefault(text.casefold(), text)
    return [texts[key] for key in sorted(texts)]


def load_docstrings(seed: int = 0, max_per_class: int = 150, num_words: int = 25) -> DocstringData:
    """Build the data set from the installed packages; takes some five seconds.

    A text that two libraries share is dropped from both.

    Args:
        seed: chooses the texts and the split; the result depends on nothing else but the installed versions.
        max_per_class: texts of each library over all the splits, at least 15 so that each split gets some.
        num_words: words kept of each docstring.

    Raises:
        ValueError: `max_per_class` is below 15 or `num_words` below 1.
        RuntimeError: a library has too few docstrings, mostly because it is not installed; says what to install.
    """
    if max_per_class < 15:
        raise ValueError(f"max_per_class={max_per_class}: use at least 15, or a split has no text of some class")
    if num_words < 1:
        raise ValueError(f"num_words={num_words}: use at least 1")
    # A generator for each library, seeded by its name: the texts of one do not depend on how many another has.
    generators = {library: random.Random(f"{seed} {library}") for library in LIBRARIES}
    texts_of = {library: _texts_of(library, num_words, rng) for library, rng in generators.items()}
    occurrences = Counter(text.casefold() for texts in texts_of.values() for text in texts)

    splits: dict[str, list[LabelledText]] = {"train": [], "validation": [], "test": []}
    for label, (library, distribution) in enumerate(LIBRARIES.items()):
        texts = [text for text in texts_of[library] if occurrences[text.casefold()] == 1]
        needed = min(_MIN_PER_CLASS, max_per_class)
        if len(texts) < needed:
            remedy = (
                f"`pip install --upgrade {distribution}`"
                if distribution
                else f"a Python with the sources of its standard library ({sys.executable} seems to lack them)"
            )
            raise RuntimeError(f"{library}: found {len(texts)} docstrings, {needed} are needed; remedy: {remedy}")
        examples = [
            LabelledText(text, label) for text in generators[library].sample(texts, min(len(texts), max_per_class))
        ]
        num_validation, num_test = round(len(examples) * _VALIDATION_SHARE), round(len(examples) * _TEST_SHARE)
        splits["validation"] += examples[:num_validation]
        splits["test"] += examples[num_validation : num_validation + num_test]
        splits["train"] += examples[num_validation + num_test :]

    for name, examples in splits.items():
        random.Random(f"{seed} {name}").shuffle(examples)
    return DocstringData(label_names=tuple(LIBRARIES), **{name: tuple(examples) for name, examples in splits.items()})
