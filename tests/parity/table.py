"""What a row of the table is, and the two methods that it is run with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from wara_peft import WaRAConfig, save_as_lora
from wara_peft.layers.base import WaRALayer

WORKS = "works"
REFUSED = "refused: "
"""Before a part of the error's message."""
DIFFERS = "differs: "
"""Before what a check returns."""


@dataclass(frozen=True)
class Method:
    """LoRA or WaRA, under names that do not tell which.

    Attributes:
        name: its name.
        config_class, layer_class: its classes.
        prefix: how its own fields and modules begin.
        init_field: the field that is False for random factors.
    """

    name: str
    config_class: type[PeftConfig]
    layer_class: type[BaseTunerLayer]
    prefix: str
    init_field: str

    def config(self, init: Any = True, **fields: Any) -> Any:
        """A config; `alpha` and `dropout` are the fields that have the prefix before these names."""
        own = {f"{self.prefix}_{name}": fields.pop(name) for name in ("alpha", "dropout") if name in fields}
        return self.config_class(**{self.init_field: init}, **own, **fields)

    def as_lora(self, directory: Path) -> str:
        """The adapter in this directory, exported where that has to be."""
        if self is LORA:
            return str(directory)
        exported = directory.with_name(f"{directory.name}_as_lora")
        save_as_lora(exported, directory)
        return str(exported)


LORA = Method("LoRA", LoraConfig, LoraLayer, "lora", "init_lora_weights")
WARA = Method("WaRA", WaRAConfig, WaRALayer, "wara", "init_weights")
METHODS = (LORA, WARA)

Check = Callable[..., "str | None"]


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes:
        feature: as users name it.
        check: runs it with a method (and with a directory, if it has a second argument): None means that it works, a
            string says what is different, an exception other than AssertionError refuses.
        lora, wara: what is to come of it: `works`, `differs: what`, or `refused: part of the message`.
        instead: what to do where WaRA is not as LoRA.
        needs: a package without which it is not run.
        test: in place of a check, the file of tests that shows WaRA.
    """

    feature: str
    check: Check | None
    lora: str
    wara: str
    instead: str = ""
    needs: str | None = None
    test: str | None = None


@dataclass(frozen=True)
class Area:
    """Rows under a title."""

    title: str
    rows: list[Row] = field(default_factory=list)

    def row(
        self, feature: str, lora: str = WORKS, wara: str = WORKS, instead: str = "", needs: str | None = None
    ) -> Callable[[Check], Check]:
        """Adds the function below it as a row."""

        def add(check: Check) -> Check:
            self.rows.append(Row(feature, check, lora, wara, instead, needs))
            return check

        return add

    def shown_in(self, feature: str, test: str, wara: str = WORKS, instead: str = "") -> None:
        """Adds a row that another test shows, with WaRA alone or beside LoRA."""
        self.rows.append(Row(feature, None, "", wara, instead, None, test))


def outcome(row: Row, method: Method, directory: Path) -> str:
    """What comes of a row with a method."""
    assert row.check is not None
    takes_directory = "directory" in inspect.signature(row.check).parameters
    try:
        found = row.check(method, directory) if takes_directory else row.check(method)
    except AssertionError:
        raise
    except Exception as error:
        return f"{REFUSED}{error}"
    return WORKS if found is None else f"{DIFFERS}{found}"


def is_as_expected(found: str, expected: str) -> bool:
    """Whether an outcome is the one in the table, of which a refusal quotes a part."""
    if expected.startswith(REFUSED):
        return found.startswith(REFUSED) and expected.removeprefix(REFUSED) in found
    return found == expected
