"""Fields that 0.1.0 had: a user who sets one is told what to do, and a saved config that has them loads."""

from __future__ import annotations

import warnings

import pytest
from peft import PeftConfig

from wara_peft import WaRAConfig
from wara_peft.config_fields.removed_fields import REMOVED

UNSET = {"ordered_dropout": False, "component_order": None, "rank_penalty": 0.0}


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", REMOVED)
def test_a_new_config_is_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"no field '{name}'.*allocate_ranks.*save_as_lora\(path, model, rank=k\)"):
        WaRAConfig(r=2, **{name: value})


def test_unset_fields_of_a_saved_config_are_dropped_silently() -> None:
    saved = {**WaRAConfig(r=3, levels=2).to_dict(), **UNSET}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_peft_type(**saved)
    assert config == WaRAConfig(r=3, levels=2)


@pytest.mark.parametrize(
    ("name", "value"), [("ordered_dropout", True), ("component_order", ["aa1"]), ("rank_penalty", 0.1)]
)
def test_one_that_is_set_is_named_alone(name: str, value: object) -> None:
    saved = {**WaRAConfig(r=3).to_dict(), **UNSET, name: value}
    with pytest.warns(UserWarning, match=f"^The saved adapter sets {name}, with which") as caught:
        config = WaRAConfig.from_peft_type(**saved)
    assert len(caught) == 1 and config == WaRAConfig(r=3)


def test_fields_that_nobody_knows_are_still_pefts_to_name() -> None:
    saved = {**WaRAConfig(r=3).to_dict(), **UNSET, "from_the_future": 1}
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .*from_the_future"):
        assert PeftConfig.from_peft_type(**saved) == WaRAConfig(r=3)
