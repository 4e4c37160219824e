"""The package's layout: a small root, no circle of imports, none that runs upward, forms named only in forms/."""

from __future__ import annotations

import ast
import json

import pytest
from PIL import Image

from docs.layout import DRAWN, ORDER, PACKAGE, PICTURE, arrows, files, floors, folders, imports, room, rooms
from wara_peft.base_layers import kinds
from wara_peft.base_layers.kinds import KINDS, Kind
from wara_peft.forms import FORMS


def test_no_circle_of_files_or_rooms():
    of_modules = imports()
    assert {"wara_peft_cli", "forms.tiny", "wavelet"} <= of_modules.keys()
    assert "forms.factors" in of_modules["forms.tiny"]
    assert "disk.adapters.merge" in of_modules["wara_peft_cli.merge"]
    floors(of_modules)  # raises for a circle
    floor_of = floors(rooms(of_modules))
    assert floor_of["wavelet"] < floor_of["forms"] < floor_of["config"] < floor_of["layers"] < floor_of["model"]


def test_no_arrow_upward():
    line_of = {name: line for line, names in enumerate(ORDER) for name in names}
    graph = rooms(imports())
    assert line_of.keys() == graph.keys()
    upward = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if line_of[target] >= line_of[name]
    ]
    assert upward == []


def test_the_root_is_small_and_folders_are_few():
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    assert len(folders(imports())) <= 26
    assert all((path.parent / "__init__.py").is_file() for path in files())


def test_a_folder_says_what_lives_in_it():
    for path in files():
        if path.name == "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert docstring, f"{path.parent.name}/__init__.py has no docstring"


def test_the_picture_is_of_this_source():
    with Image.open(PICTURE) as picture:
        assert json.loads(picture.text[DRAWN]) == arrows(rooms(imports())), "run python docs/layout.py"


@pytest.mark.parametrize(
    ("apart", "others"),
    [
        ("attention", {"factorized"}),
        ("compression", {"attention", "base_layers", "calibration", "disk", "factorized", "linear_algebra"}),
        ("factorized", {"dequantized"}),
        ("wavelet", set()),
    ],
)
def test_what_knows_nothing_of_adapters(apart, others):
    reached = {target for module, targets in imports().items() if room(module) == apart for target in targets}
    assert {room(target) for target in reached} <= {apart, "arguments", "compiled", "messages", *others}
    assert not any(target.startswith("disk.adapters") for target in reached)


def test_forms_are_named_in_their_own_files_and_the_configs_list_alone():
    named = {
        path.name
        for path in files()
        if path.parent.name != "forms"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in FORMS.keys() - {"subband"}  # which is a word too
    }
    assert named == {"config.py"}


KINDS_AND_LAYERS = {
    cls.__name__ for kind in KINDS.values() for cls in (kind.base_class, kind.layer_class) if cls is not None
}
NAMED_KINDS = {name for name, value in vars(kinds).items() if isinstance(value, (Kind, list)) and name.isupper()}


def test_kinds_of_layers_are_told_apart_in_base_layers_alone():
    assert {"Conv1D", "Conv2d", "Embedding", "LowRankLinear", "FactorizedLinear"} <= KINDS_AND_LAYERS
    assert {"LINEAR", "IN_PROJ", "CONVOLUTIONS"} <= NAMED_KINDS
    asked = {
        f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for path in files()
        if PACKAGE in path.parents
        and path.parent.name not in ("base_layers", "layers")
        and path.relative_to(PACKAGE).parts[0] not in ("attention", "compression", "factorized")  # know no adapters
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if _asks(node)
    }
    assert asked == set()


def _asks(node: ast.AST) -> bool:
    """Whether code looks at a layer's class, compares kinds, or looks one up by its name."""
    names = {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node)}
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", None) in ("isinstance", "issubclass") and bool(names & KINDS_AND_LAYERS)
    if isinstance(node, ast.Compare):
        return bool(names & NAMED_KINDS)
    return isinstance(node, ast.Subscript) and "KINDS" in names and isinstance(node.slice, ast.Constant)
