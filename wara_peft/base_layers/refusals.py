"""Why modules cannot be adapted, and the `exclude_modules` that leaves them out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..messages import first_few


@dataclass(frozen=True)
class Refusal:
    """Why a module cannot be adapted.

    Attributes:
        sentence: the reason, with `{}` in place of the names of all modules that have it.
        detail: words behind the name of this module, such as its shape; they differ between the modules of a reason.
    """

    sentence: str
    detail: str = ""


def reasons_in_words(refusals: Mapping[str, Refusal]) -> str:
    """Write one sentence for each reason, with the names of the modules that have it."""
    by_sentence: dict[str, list[str]] = {}
    for name, refusal in refusals.items():
        by_sentence.setdefault(refusal.sentence, []).append(f"{name!r}{refusal.detail}")
    return " ".join(sentence.format(first_few(names)) for sentence, names in by_sentence.items())


def refusal_message(
    refusals: Mapping[str, Refusal], targets: Iterable[str], excluded: Iterable[str] | str | None
) -> str:
    """Write an error's message: why modules cannot be adapted, and how to adapt the others.

    Args:
        refusals: the reasons, by module.
        targets: names of all target modules.
        excluded: the value of `exclude_modules`.
    """
    kept = [name for name in targets if name not in refusals]
    reasons = reasons_in_words(refusals)
    if not kept:
        return f"{reasons} Name others in `target_modules`, or leave these out with `exclude_modules`."
    value = exclude_modules_for(refusals, kept, excluded)
    return (
        f"{reasons} Leave such modules out with `exclude_modules={value!r}`, or name other modules in "
        "`target_modules`."
    )


def exclude_modules_for(
    refused: Iterable[str], kept: Iterable[str], excluded: Iterable[str] | str | None
) -> list[str] | str:
    """Find the value of `exclude_modules` that leaves out these modules and no others.

    Args:
        refused: full names of the modules to leave out.
        kept: full names of the target modules that stay.
        excluded: the value that the config has now, whose modules stay excluded.

    Returns:
        The shortest endings of names that tell `refused` from `kept`. If some name has no such ending, or the config
        has a regular expression, the result is a regular expression.
    """
    kept = [f".{name}" for name in kept]
    endings = {name: _own_ending(name, kept) for name in refused}
    found = sorted({ending for ending in endings.values() if ending is not None})
    in_full = [re.escape(name) for name, ending in endings.items() if ending is None]
    # The field takes a list of endings or one regular expression, never both, and a full name in a list would
    # exclude all names that end in it.
    if isinstance(excluded, str) or in_full:
        if excluded and not isinstance(excluded, str):
            found, excluded = sorted({*found, *excluded}), None
        by_ending = [rf"(.*\.)?({'|'.join(re.escape(ending) for ending in found)})"] if found else []
        return "|".join([*([excluded] if isinstance(excluded, str) else []), *in_full, *by_ending])
    return sorted({*found, *(excluded or ())})


def _own_ending(name: str, others: list[str]) -> str | None:
    """The shortest ending of a module's name that none of the others has."""
    parts = name.split(".")
    # An ending does not begin with a number: "layers.0.q_proj" tells a reader which module it is, "0.q_proj" does not.
    starts = [start for start, part in enumerate(parts) if start == 0 or not part.isdigit()]
    endings = (".".join(parts[start:]) for start in reversed(starts))
    return next((end for end in endings if not any(other.endswith(f".{end}") for other in others)), None)
