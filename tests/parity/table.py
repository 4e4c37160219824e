"""What a row of the table is, and the three methods that it is run with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from wara_peft import WaRAConfig, plain_lora, reparametrize_lora, save_as_lora
from wara_peft.layers.base import WaRALayer
from wara_peft.lora.coefficients_file import FILE

from . import same_factors

WORKS = "works"
REFUSED = "refused: "
"""Before a part of the error's message."""
DIFFERS = "differs: "
"""Before what a check returns."""


@dataclass(frozen=True)
class Method:
    """LoRA, WaRA's own adapter or WaRA inside LoRA, under names that do not tell which.

    Attributes:
        name: its name.
        config_class, layer_class: its classes.
        prefix: how its own fields and modules begin.
        init_field: the field that is False for random factors.
        finish: what is done with a model whose adapter of this name was made from a config.
        saved_too: files that `save_pretrained` writes beside PEFT's.
    """

    name: str
    config_class: type[PeftConfig]
    layer_class: type[BaseTunerLayer]
    prefix: str
    init_field: str
    finish: Callable[[nn.Module, str], None] = lambda model, adapter_name: None
    saved_too: frozenset[str] = frozenset()

    def config(self, init: Any = True, **fields: Any) -> Any:
        """A config; `alpha` and `dropout` are the fields that have the prefix before these names."""
        own = {f"{self.prefix}_{name}": fields.pop(name) for name in ("alpha", "dropout") if name in fields}
        return self.config_class(**{self.init_field: init}, **own, **fields)

    def as_lora(self, directory: Path) -> str:
        """The adapter in this directory, exported where that has to be."""
        if self is not WARA:
            return str(directory)
        exported = directory.with_name(f"{directory.name}_as_lora")
        save_as_lora(exported, directory)
        return str(exported)


def _reparametrize(model: nn.Module, adapter_name: str) -> None:
    """Put WaRA inside of a LoRA; random factors are projected. A refusal leaves the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    project = model.peft_config[adapter_name].init_lora_weights is False
    try:
        reparametrize_lora(model, adapter_name, project=project)
        same_factors.count_adapter()
    except ValueError:
        assert all(value.equal(model.state_dict()[name]) for name, value in before.items())
        raise


def _take_factors(model: nn.Module, adapter_name: str) -> None:
    """Give a plain LoRA the factors that WaRA inside of it would have."""
    _reparametrize(model, adapter_name)
    plain_lora(model, adapter_name)


_LORA: tuple[Any, ...] = (LoraConfig, LoraLayer, "lora", "init_lora_weights")
LORA = Method("LoRA", *_LORA)
WARA = Method("WaRA", WaRAConfig, WaRALayer, "wara", "init_weights")
INSIDE = Method("WaRA inside LoRA", *_LORA, _reparametrize, frozenset({FILE}))
SAME_FACTORS = Method("LoRA with the factors of WaRA inside LoRA", *_LORA, _take_factors)
METHODS = (LORA, WARA, INSIDE)

Check = Callable[..., "str | None"]


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes:
        feature: as users name it.
        check: runs it with a method (and with a directory, if it has a second argument): None means that it works, a
            string says what is different, an exception other than AssertionError refuses.
        lora, wara: what is to come of it: `works`, `differs: what`, or `refused: part of the message`.
        inside: what comes of it with WaRA inside LoRA; where it is not said, what comes with LoRA.
        instead: what to do where WaRA's own adapter is not as LoRA.
        needs: a package without which it is not run.
        dtype: of its models.
        test, inside_test: in place of a check, the files of tests that show WaRA and WaRA inside LoRA.
    """

    feature: str
    check: Check | None
    lora: str
    wara: str
    inside: str
    instead: str = ""
    needs: str | None = None
    test: str | None = None
    inside_test: str | None = None
    dtype: torch.dtype = torch.float64

    def expected(self, method: Method) -> str:
        """What is to come of it with a method."""
        return {LORA.name: self.lora, WARA.name: self.wara}.get(method.name, self.inside)


@dataclass(frozen=True)
class Area:
    """Rows under a title."""

    title: str
    rows: list[Row] = field(default_factory=list)

    def row(
        self,
        feature: str,
        lora: str = WORKS,
        wara: str = WORKS,
        instead: str = "",
        needs: str | None = None,
        inside: str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Callable[[Check], Check]:
        """Adds the function below it as a row."""

        def add(check: Check) -> Check:
            self.rows.append(
                Row(feature, check, lora, wara, lora if inside is None else inside, instead, needs, dtype=dtype)
            )
            return check

        return add

    def shown_in(
        self, feature: str, test: str, wara: str = WORKS, instead: str = "", inside: str = "", inside_test: str = ""
    ) -> None:
        """Adds a row that other tests show, with WaRA only or beside LoRA."""
        self.rows.append(Row(feature, None, "", wara, inside, instead, None, test, inside_test or None))


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
