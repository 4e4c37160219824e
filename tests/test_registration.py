"""PEFT's registries know WARA, and importing or reloading changes nothing."""

from __future__ import annotations

import importlib

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import wara_peft
from tests.forked_python import run_python
from wara_peft import registration


def test_the_member_is_one_like_any_other():
    member = PeftType.WARA
    assert isinstance(member, PeftType)
    assert member == "WARA" == member.value == member.name
    assert PeftType("WARA") is PeftType["WARA"] is member
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(list(PeftType))
    assert peft.PeftType is PeftType
    with pytest.raises(ValueError, match="WARRA"):
        PeftType("WARRA")


def test_registries_hold_our_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.WARA] is wara_peft.WaRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.WARA] is wara_peft.WaRAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.WARA] == "wara_"


def test_reloading_is_harmless():
    members = list(PeftType)
    importlib.reload(wara_peft)
    assert list(PeftType) == members
    test_registries_hold_our_classes()


def test_a_wara_of_pefts_own_is_left_alone(monkeypatch):
    monkeypatch.delattr(PeftType.WARA, "_added_by_wara_peft")
    with pytest.raises(ImportError, match="has a method WARA of its own"):
        registration.peft_type()


@pytest.mark.slow
def test_forgotten_import_gives_the_error_that_the_readme_shows(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "WARA"}')
    code = f"""
import traceback
import peft
try:
    peft.PeftConfig.from_pretrained({str(tmp_path)!r})
except KeyError:
    traceback.print_exc()
import wara_peft
print(peft.PeftConfig.from_pretrained({str(tmp_path)!r}).peft_type)
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip().endswith("KeyError: 'WARA'")
    assert result.stdout.strip().endswith("WARA")
