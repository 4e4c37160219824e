"""The package's layout: no circle of imports, none that runs upward, and forms named in forms/ alone."""

from __future__ import annotations

import ast
import json

import pytest
from PIL import Image

from docs.layout import DRAWN, ORDER, PACKAGE, PICTURE, arrows, floors, imports, room, rooms
from wara_peft.forms import FORMS


def test_no_circle_of_files_or_rooms():
    of_modules = imports()
    assert {"cli", "forms.tiny", "wavelet"} <= of_modules.keys()
    assert "forms.factors" in of_modules["forms.tiny"]
    floors(of_modules)  # raises for a circle
    floor_of = floors(rooms(of_modules))
    assert floor_of["wavelet"] < floor_of["forms"] < floor_of["config"] < floor_of["layer"] < floor_of["model"]


def test_no_arrow_upward():
    line_of = {name: line for line, names in enumerate(ORDER) for name in names}
    assert all((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() for name in line_of)
    upward = [
        f"{name} -> {target}"
        for name, targets in rooms(imports()).items()
        for target in targets
        if name in line_of and target in line_of and line_of[target] > line_of[name]
    ]
    assert upward == []


def test_the_picture_is_of_this_source():
    with Image.open(PICTURE) as picture:
        assert json.loads(picture.text[DRAWN]) == arrows(rooms(imports())), "run python docs/layout.py"


@pytest.mark.parametrize(
    ("apart", "others"),
    [
        ("attention", {"factorized"}),
        ("compression", {"attention", "calibration", "disk", "factorized", "moments", "ordered_components"}),
        ("factorized", set()),
        ("wavelet", set()),
    ],
)
def test_what_knows_nothing_of_adapters(apart, others):
    reached = {target for module, targets in imports().items() if room(module) == apart for target in targets}
    assert {room(target) for target in reached} <= {apart, "arguments", "compiled", "messages", *others}
    assert not reached & {"disk.adapter", "disk.base_model", "disk.contents", "disk.merge"}


def test_forms_are_named_in_their_own_files_and_the_configs_list_alone():
    named = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "forms"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in FORMS.keys() - {"subband"}  # which is a word too
    }
    assert named == {"config.py"}
