"""Translation pairs that need no network: interface messages in English and in one of a hundred languages.

They are the translation catalogues of Django, which lie in its package as gettext's `.po` files, and are read by
Babel. The same version of Django, language and seed give the same pairs in every process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
from pathlib import Path
from typing import NamedTuple

SHORTEST, LONGEST = 3, 200
"""Characters of an English message; longer ones are whole pages of help."""
VALIDATION_SHARE = TEST_SHARE = 0.15


class Pair(NamedTuple):
    """A message and its translation, both with the placeholders that a program fills, such as `%(name)s`."""

    source: str
    target: str


class Splits(NamedTuple):
    """Pairs to train, to choose and to test with; no English message is in two of them."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


def load_messages(language: str = "de", seed: int = 0) -> Splits:
    """Return all usable messages of Django and their translations, shuffled and split.

    Messages with plural forms are left out, and those whose translation is the English message or is missing.

    Args:
        language: the name of a catalogue's folder, such as "de" or "pt_BR"; see `languages`.
        seed: seed of the order and of the splits.

    Raises:
        ValueError: there is no such language.
        RuntimeError: Django or Babel is not installed.
    """
    if language not in languages():
        raise ValueError(f"Django has no messages in {language!r}; it has {', '.join(languages())}")
    pairs = list(translations(language).items())
    random.Random(seed).shuffle(pairs)
    return split([Pair(*pair) for pair in pairs])


def split(pairs: list[Pair]) -> Splits:
    """Split pairs of different messages, in the order in which they come."""
    validation, test = (int(share * len(pairs)) for share in (VALIDATION_SHARE, TEST_SHARE))
    return Splits(pairs[validation + test :], pairs[:validation], pairs[validation : validation + test])


def languages() -> list[str]:
    """Return the names of all languages that Django's messages have been translated to."""
    found = {path.parent.parent.name for path in _django().glob("**/locale/*/LC_MESSAGES/django.po")}
    return sorted(found - {"en"})


def language_name(language: str) -> str:
    """Return the English name of a language, "German" for "de"; the name itself if Babel knows no such language."""
    from babel import Locale, UnknownLocaleError

    try:
        return Locale.parse(language).get_display_name("en") or language
    except (UnknownLocaleError, ValueError):
        return language


def translations(language: str) -> dict[str, str]:
    """Return the usable messages of all catalogues of a language; the first translation of a message counts."""
    root = _django()
    try:
        from babel.messages.pofile import read_po
    except ImportError as error:
        raise RuntimeError("Babel is not installed; `pip install babel` brings it") from error
    found: dict[str, str] = {}
    for path in sorted(root.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
        # Babel prints a warning for each message that has more plural forms than it expects.
        with path.open("rb") as file, contextlib.redirect_stdout(io.StringIO()):
            catalog = read_po(file)
        for message in catalog:
            source, target = message.id, message.string
            if not isinstance(source, str) or message.fuzzy or not SHORTEST <= len(source) <= LONGEST:
                continue
            if target and target != source:
                found.setdefault(source, target)
    return found


def _django() -> Path:
    """Return the folder of the package, which need not be imported."""
    spec = importlib.util.find_spec("django")
    if spec is None or spec.origin is None:
        raise RuntimeError("Django is not installed; `pip install django` brings it")
    return Path(spec.origin).parent
