"""The docstring data set is what its docstring says: on libraries that are written here, so each text is known."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from tests.examples.test_examples import EXAMPLES, example

# Longer names may not occur at all; the short ones are part of other words ("pil" of "compile").
NAMES = re.compile(
    "torch|scipy|numpy|pandas|networkx|scikit|sklearn|matplotlib|pyplot|sympy|pillow|asyncio|email|transformers|datasets"
    "|accelerate|peft|huggingface|jinja"
)
SHORT_NAMES = re.compile("(?<![a-z])(np|pd|plt|mpl|nx|nn|pil|hf|hub|stats|signal|optimize|logging)(?![a-z])")

# As in the data set itself: labels, which are dotted paths, and distributions.
LIBRARIES = {"orchard": "orchard-dist", "kitchen.stove": "kitchen-dist", "harbour": None}
ORCHARD, STOVE, HARBOUR = range(3)
NEVER_IMPORTED = "raise ImportError('sources are read, never imported')\n"

# A file of `orchard`, and the texts that it gives.
SOURCE = '''
"""A module has a docstring with more words than are needed for a text."""
async def wait():
    """An async function has a docstring of exactly nine words"""
class Tree:
    """A class has a docstring
       over two lines and with   spaces."""
    def _private(self):
        """A private method has a docstring with enough words."""
    def grow(self):
        """A method has a docstring with enough words."""
    class Branch:
        """A class within a class has a docstring with enough words."""
class _Private:
    """A private class has a docstring with enough words."""
    def method(self):
        """A method of a private class has a docstring with enough words."""
if True:
    def conditional():
        """A conditional function has a docstring with enough words."""
try:
    pass
except ImportError:
    def fallback():
        """A fallback function has a docstring with enough words."""
def short():
    """Only seven words are in this docstring"""
def eight():
    """But exactly eight words are in this docstring"""
def long():
    """a1 a2 a3 a4 a5 a6 a7 a8 a9 b1 b2 b3 b4 b5 b6 b7 b8 b9 c1 c2 c3 c4 c5 c6 c7 c8 c9"""
def two_words_become_one():
    """%s"""
def once():
    """These words come again, but in another case"""
def again():
    """THESE words come again, but in another CASE"""
def shared():
    """Another library has this docstring too, in another case"""
def names():
    """Calls is_torch_available and NumpyArray, or `np.array` of PyTorch, to compile a scikit-learn pipeline"""
def parts_of_words():
    """See PEFT, peft.tuners, HuggingFace transformers: not the optimizer, the signals or the pilot"""
''' % ("Hugging Face " * 30)
TEXTS = [
    "An async function has a docstring of exactly nine words",
    "A class has a docstring over two lines and with spaces.",
    "A method has a docstring with enough words.",
    "A class within a class has a docstring with enough words.",
    "A conditional function has a docstring with enough words.",
    "A fallback function has a docstring with enough words.",
    "But exactly eight words are in this docstring",
    "a1 a2 a3 a4 a5 a6 a7 a8 a9 b1 b2 b3 b4 b5 b6 b7 b8 b9 c1 c2 c3 c4 c5 c6 c7",
    " ".join(["lib"] * 25),
    "These words come again, but in another case",
    "Calls is_lib_available and libArray, or `lib.array` of lib, to compile a lib pipeline",
    "See lib, lib.tuners, lib lib: not the optimizer, the signals or the pilot",
]


def numbered(library: str, number: int) -> str:
    return f"Docstring number {number} of the library {library}, long enough to be kept"


def functions(*docstrings: str) -> str:
    return NEVER_IMPORTED + "".join(f'def function():\n    """{docstring}"""\n' for docstring in docstrings)


def files(stoves: int = 100, files_of_harbour: int = 100) -> dict[str, str]:
    """Contents by path: `orchard` has 120 texts, `kitchen.stove` as many as are asked for, `harbour` two a file."""
    skipped = functions("This file is not read, although its docstring has enough words")
    rest = (numbered("orchard", i) for i in range(120 - len(TEXTS)))
    found = {
        "orchard/__init__.py": NEVER_IMPORTED,
        "orchard/kinds.py": SOURCE + NEVER_IMPORTED,
        "orchard/deep/er/rest.py": functions(*rest),
        "orchard/template.py": functions("This file is not Python, although it has docstrings") + "def {{name}}(:\n",
        "orchard/zero.py": functions("This file is not Python either, for there is a zero in it") + "\0",
        "orchard/notes.txt": skipped,
        **{f"orchard/deep/{name}/code.py": skipped for name in ("tests", "test", "testing", "_vendor", "models")},
        "kitchen/__init__.py": NEVER_IMPORTED,
        "kitchen/sink.py": skipped,
        "kitchen/stove/__init__.py": functions("Another library HAS this docstring too, in another case"),
        "kitchen/stove/gas.py": functions(*(numbered("stove", i) for i in range(stoves))),
        "harbour/__init__.py": NEVER_IMPORTED,
    }
    for i in range(files_of_harbour - 1):
        found[f"harbour/pier{i}.py"] = functions(numbered("harbour", 2 * i), numbered("harbour", 2 * i + 1))
    return found


def write(root: Path, contents: dict[str, str]) -> Path:
    for path, source in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source)
    return root


@pytest.fixture(scope="module")
def docstring_data() -> ModuleType:
    return example("docstring_data")


@pytest.fixture
def load(docstring_data: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Build the data set from the libraries in a folder."""
    monkeypatch.setattr(docstring_data, "LIBRARIES", LIBRARIES)

    def data(root: Path, **options: int):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(root))
            return docstring_data.load_docstrings(**options)

    return data


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("installed"), files())


def splits_of(data) -> dict[str, tuple]:
    return {"train": data.train, "validation": data.validation, "test": data.test}


def examples_of(data) -> list[tuple[str, int]]:
    return [example for split in splits_of(data).values() for example in split]


def texts_of(data, label: int) -> set[str]:
    return {text for text, its_label in examples_of(data) if its_label == label}


class TestTexts:
    def test_each_text_is_a_public_docstring_of_its_library_masked_and_cut(self, load, installed: Path) -> None:
        data = load(installed)
        assert data.label_names == ("orchard", "kitchen.stove", "harbour")
        orchard = {*TEXTS, *(numbered("orchard", i) for i in range(120 - len(TEXTS)))}
        # Of two that differ in case one is kept, either of them.
        assert {text.casefold() for text in texts_of(data, ORCHARD)} == {text.casefold() for text in orchard}
        assert texts_of(data, STOVE) == {numbered("stove", i) for i in range(100)}
        assert texts_of(data, HARBOUR) < {numbered("harbour", i) for i in range(2 * 99)}

    def test_no_text_is_twice_in_whatever_split(self, load, installed: Path) -> None:
        texts = [text.casefold() for text, _ in examples_of(load(installed))]
        assert len(texts) == len(set(texts)) == 120 + 100 + 150

    def test_no_text_names_a_library(self, load, installed: Path) -> None:
        texts = [text.casefold() for text, _ in examples_of(load(installed))]
        assert sum("lib" in text.split() for text in texts) == 3
        assert not [text for text in texts if NAMES.search(text) or SHORT_NAMES.search(text)]

    def test_names_checked_here_cover_the_labels(self, docstring_data: ModuleType) -> None:
        parts = [part for label in docstring_data.LIBRARIES for part in re.split(r"[._]", label.casefold())]
        assert not [part for part in parts if not (NAMES.search(part) or SHORT_NAMES.search(part))]

    @pytest.mark.parametrize(
        ("docstring", "masked"),
        [
            ("Cast a\n    NumPy array (np.array).", "Cast a lib array (lib.array)."),
            ("See is_torch_available, PyTorch.", "See is_lib_available, lib."),
            ("compile an optimizer", "compile an optimizer"),
            ("scikit-learn on the Hugging Face Hub", "lib on the lib lib"),
            ("np pd plt mpl nx nn PIL sp HF hub stats signal optimize logging", " ".join(["lib"] * 14)),
            ("networkx jinja jinja2 sympy matplotlib.pyplot asyncio", "lib lib lib lib lib.lib lib"),
        ],
    )
    def test_masking(self, docstring_data: ModuleType, docstring: str, masked: str) -> None:
        assert docstring_data.mask_library_names(docstring) == masked

    def test_fewer_words(self, load, installed: Path) -> None:
        texts = texts_of(load(installed, max_per_class=150, num_words=7), ORCHARD)
        assert "a1 a2 a3 a4 a5 a6 a7" in texts
        assert "Only seven words are in this docstring" in texts
        assert {len(text.split()) for text in texts} == {7}

    def test_of_a_hundred_files_no_more_are_read(self, load, tmp_path: Path) -> None:
        root = write(tmp_path, files(files_of_harbour=140))
        found = [texts_of(load(root, seed=seed, max_per_class=300), HARBOUR) for seed in (0, 1)]
        # Two texts a file, but for the package's own where that is among the hundred.
        assert all(len(texts) in (198, 200) for texts in found)
        assert found[0] != found[1]


class TestSplits:
    @pytest.mark.parametrize(
        ("max_per_class", "sizes"),
        [
            # thirds and fifteenths of 120, 100 and 150 texts
            (150, {"train": [80, 67, 100], "validation": [16, 13, 20], "test": [24, 20, 30]}),
            (30, {"train": [20] * 3, "validation": [4] * 3, "test": [6] * 3}),
            (15, {"train": [10] * 3, "validation": [2] * 3, "test": [3] * 3}),
        ],
    )
    def test_every_class_has_its_share_of_every_split(
        self, load, installed: Path, max_per_class: int, sizes: dict[str, list[int]]
    ) -> None:
        for name, split in splits_of(load(installed, max_per_class=max_per_class)).items():
            counts = Counter(label for _, label in split)
            assert [counts[label] for label in (ORCHARD, STOVE, HARBOUR)] == sizes[name]
            assert counts.total() == len(split)

    def test_order_is_random(self, load, installed: Path) -> None:
        """Neither classes nor texts come in turn."""
        for split in splits_of(load(installed)).values():
            labels = [label for _, label in split]
            assert labels != sorted(labels)
            texts = [text for text, label in split if label == STOVE]
            assert texts != sorted(texts)

    def test_another_seed_is_another_split_of_the_same_texts(self, load, installed: Path) -> None:
        first, second = load(installed, seed=0), load(installed, seed=1)
        assert texts_of(first, STOVE) == texts_of(second, STOVE)
        assert {*first.test} != {*second.test}

    @pytest.mark.parametrize(("changed", "label"), [({"stoves": 77}, STOVE), ({"files_of_harbour": 140}, HARBOUR)])
    def test_the_split_of_one_library_does_not_depend_on_another(
        self, load, installed: Path, tmp_path: Path, changed: dict[str, int], label: int
    ) -> None:
        first = load(installed, max_per_class=30)
        second = load(write(tmp_path, files(**changed)), max_per_class=30)
        assert texts_of(first, label) != texts_of(second, label)
        for name, split in splits_of(first).items():
            other = splits_of(second)[name]
            assert {e for e in split if e.label != label} == {e for e in other if e.label != label}


class TestDeterminism:
    @pytest.mark.parametrize("hash_seed", ["1", "2"])
    def test_another_process_gets_the_same(self, load, installed: Path, hash_seed: str) -> None:
        code = (
            f"import sys; sys.path.insert(0, {str(installed)!r}); import docstring_data as d; "
            f"d.LIBRARIES = {LIBRARIES}; print(ascii(d.load_docstrings(max_per_class=60)))"
        )
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLES), "PYTHONHASHSEED": hash_seed}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == ascii(load(installed, max_per_class=60)), result.stderr

    def test_the_order_in_which_a_file_system_lists_files_does_not_matter(
        self, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = write(tmp_path, files(files_of_harbour=140))
        data, rglob = load(root), Path.rglob
        monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed([*rglob(self, pattern)]))
        assert load(root) == data


class TestErrors:
    def test_a_missing_package_is_an_error_that_names_it(
        self, docstring_data: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(docstring_data, "LIBRARIES", {"not_a_library_here.inner": "its-distribution"})
        with pytest.raises(RuntimeError, match=r"not_a_library_here.*found 0 .*pip install .*its-distribution"):
            docstring_data.load_docstrings()

    def test_too_few_docstrings_are_an_error_that_counts_them(self, load, tmp_path: Path) -> None:
        root = write(tmp_path, files(stoves=99))
        with pytest.raises(RuntimeError, match=r"^kitchen\.stove: found 99 docstrings, 100 are needed.*kitchen-dist"):
            load(root)
        assert len(texts_of(load(root, max_per_class=99), STOVE)) == 99

    def test_a_library_of_python_itself_has_another_remedy(self, load, tmp_path: Path) -> None:
        root = write(tmp_path, files(files_of_harbour=5))
        with pytest.raises(RuntimeError, match=r"^harbour: found 8 docstrings.*Python with the sources"):
            load(root)

    @pytest.mark.parametrize(
        ("options", "message"), [({"max_per_class": 14}, "max_per_class=14"), ({"num_words": 0}, "num_words=0")]
    )
    def test_a_size_without_a_meaning_is_an_error(self, docstring_data: ModuleType, options, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            docstring_data.load_docstrings(**options)


@pytest.mark.slow
def test_the_installed_libraries_have_enough_docstrings(
    docstring_data: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asserted holds for any of their versions; a third of the files have several times the texts."""
    monkeypatch.setattr(docstring_data, "_MAX_FILES", 30)
    data = docstring_data.load_docstrings(max_per_class=15)
    assert data.label_names == tuple(docstring_data.LIBRARIES)
    for name, share in (("train", 10), ("validation", 2), ("test", 3)):
        assert Counter(label for _, label in splits_of(data)[name]) == dict.fromkeys(range(20), share)
    texts = [text.casefold() for text, _ in examples_of(data)]
    assert len(set(texts)) == len(texts)
    assert all(8 <= len(text.split()) <= 25 for text in texts)
    assert not [text for text in texts if NAMES.search(text) or SHORT_NAMES.search(text)]
