"""The draft in docs/peft_entry_points.md, applied to a copy of the installed PEFT, does what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import peft
import pytest
import torch
from peft import get_peft_model

from tests.forked_python import run_python
from tests.training_run import base_model, logits
from wara_peft import WaRAConfig

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

# PEFT that this process has imported is forgotten, so that the copy is imported, as in a fresh interpreter.
FORGETS = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
    del sys.modules[name]
import peft
assert peft.__file__ == sys.argv[1] and "wara_peft" not in sys.modules
"""
LOADS = """
import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import AutoModelForSequenceClassification
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("base"), "adapter").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 25).view(4, 6)).logits, "logits.pt")
assert PeftType("WARA") is model.peft_config["default"].peft_type
try:
    PeftConfig.from_peft_type(peft_type="NOBODYS")
except KeyError as error:
    print(error)
"""
REGISTERS = """
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
class Config(LoraConfig): pass
register_peft_method(name="other", config_cls=Config, model_cls=None)
assert PeftType("OTHER").value == "OTHER" and PEFT_TYPE_TO_CONFIG_MAPPING["OTHER"] is Config
assert PeftType("LORA") is PeftType.LORA and PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig
"""


def test_an_installed_package_brings_its_method(tmp_path):
    site = tmp_path / "site"
    shutil.copytree(Path(peft.__file__).parent, site / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "docs" / "peft_entry_points.md").read_text(encoding="utf-8")
    (patch,) = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    (tmp_path / "draft.patch").write_text(patch)
    applied = subprocess.run(["git", "apply", tmp_path / "draft.patch"], cwd=site, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    (group, entry) = re.search(r'\[project\.entry-points\."(.*?)"\]\n(.*?)\n', text).groups()
    (site / "plugin-1.0.dist-info").mkdir()
    (site / "plugin-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (site / "plugin-1.0.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")

    base_model().save_pretrained(tmp_path / "base")
    base = type(base_model()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, WaRAConfig(target_modules="all-linear", init_weights=False, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")

    path = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    for program in (LOADS, REGISTERS):
        result = run_python("-c", FORGETS + program, site / "peft" / "__init__.py", cwd=tmp_path, env=path)
        assert result.returncode == 0, result.stderr
        if program is LOADS:
            assert "PEFT has no method 'NOBODYS', and no installed package adds it." in result.stdout
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))
