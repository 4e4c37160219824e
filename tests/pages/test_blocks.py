"""Every block of code of README and docs: Python and `wara-peft` are run, what other commands name is checked."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from tests.pages.blocks import ILLUSTRATIONS, NOT_RUN, PARSED, ROOT, Block, blocks_of, check_command, command_line
from tests.pages.names import CHECKS, NAMES, Names
from tests.pages.test_links import PAGES, prose
from tests.test_project import PROJECT
from wara_peft_cli.app import app

WITH_CODE = [path for path in PAGES if any(block.language not in ILLUSTRATIONS for block in blocks_of(path))]


def run_commands(block: Block) -> None:
    for command in block.commands():
        if command.startswith("wara-peft ") and block.mark != PARSED:
            result = CliRunner().invoke(app, shlex.split(command)[1:], prog_name="wara-peft")
            assert result.exit_code == 0, f"{command}: {result.output}{result.stderr}"
        else:
            check_command(command)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = str(path.relative_to(ROOT))
    names: Names = {}
    for block in blocks_of(path):
        if block.mark == NOT_RUN or block.language in ILLUSTRATIONS:
            continue
        assert block.language in ("python", "bash"), f"{page}, line {block.line}: of which language is this?"
        names.update(NAMES[page]() if page in NAMES else {})
        if block.language == "bash":
            run_commands(block)
        else:
            exec(compile("\n" * block.line + block.code, path, "exec"), names)
    if page in CHECKS:
        CHECKS[page](names, capsys.readouterr().out)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_text(path: Path) -> None:
    for text in re.findall(r"`((?:pytest|python -m|python \S+\.py|pip|wara-peft) [^`]+|python \S+\.py)`", prose(path)):
        for command in text.split(" && "):
            if "NAME" in command:
                continue
            name, *words = shlex.split(command)
            if name == "wara-peft":  # may name a subcommand and an option alone
                command_line(*words)
            else:
                check_command(command)


def test_the_first_block_of_the_readme_imports_nothing_but_the_package_and_its_dependencies() -> None:
    """It runs after an installation without extras."""
    first = next(block for block in blocks_of(ROOT / "README.md") if block.language == "python")
    nodes = list(ast.walk(ast.parse(first.code)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    assert imported <= {"wara_peft", *(Requirement(entry).name for entry in PROJECT["dependencies"])}
    assert "from_pretrained" not in first.code and len([line for line in first.code.splitlines() if line]) <= 14
