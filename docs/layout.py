"""Draws who imports whom in the package, top to bottom, from the source: `python docs/layout.py` writes layout.png."""

from __future__ import annotations

import ast
import json
from collections.abc import Container, Iterable
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "wara_peft"
COMMAND_LINE = ROOT / "wara_peft_cli"
PICTURE = Path(__file__).with_suffix(".png")
DRAWN = "Description"
"""Where the picture's metadata say what is drawn in it."""
ORDER = (
    ("compiled", "arguments", "dequantized", "messages", "registration", "linear_algebra", "calibration", "wavelet"),
    ("factorized",),
    ("base_layers", "attention"),
    ("forms",),
    ("config_fields",),
    ("config",),
    ("layers",),
    ("disk", "training"),
    ("injection", "compression", "inspection"),
    ("model",),
    ("allocation", "lora"),
    ("__init__",),
    ("wara_peft_cli",),
)
"""Rooms from the ground up. What stands on one line may import what stands on lines before it, and not the reverse."""


def module_name(path: Path) -> str:
    """`forms.tiny` for wara_peft/forms/tiny.py, `forms` for its __init__, `wara_peft_cli.run` in the other package."""
    parts = path.relative_to(ROOT if COMMAND_LINE in path.parents else PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def files() -> list[Path]:
    """The Python files of both packages."""
    return sorted([*PACKAGE.rglob("*.py"), *COMMAND_LINE.rglob("*.py")])


def imports() -> dict[str, set[str]]:
    """The modules that each module of the packages imports, anywhere in its text: in functions and for types too."""
    paths = {module_name(path): path for path in files()}
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        folder = path.relative_to(ROOT).parts[:-1]
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                above = folder[: len(folder) - node.level + 1] if node.level else ()
                base = ".".join([*above, *filter(None, [node.module])])
                found_names = (_module(f"{base}.{alias.name}", paths) or _module(base, paths) for alias in node.names)
                targets |= {target for target in found_names if target}
            elif isinstance(node, ast.Import):
                targets |= {target for alias in node.names if (target := _module(alias.name, paths))}
        found[name] = targets - {name}
    return found


def _module(dotted: str, paths: Container[str]) -> str | None:
    """The name here of a module of the packages, or None for another one."""
    name = "__init__" if dotted == PACKAGE.name else dotted.removeprefix(f"{PACKAGE.name}.")
    return name if name in paths else None


def room(module: str) -> str:
    """The file or folder at the top of the package in which a module lies."""
    return module.split(".")[0]


def folders(of_modules: Iterable[str]) -> set[str]:
    """The folders in which modules lie, `compression.disk` for compression/disk/; the package itself is ``""``."""
    return {name if _is_folder(name) else name.rpartition(".")[0] for name in of_modules}


def _is_folder(module: str) -> bool:
    path = Path(*module.split("."))
    return (ROOT / path if module.startswith(COMMAND_LINE.name) else PACKAGE / path).is_dir()


def rooms(of_modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """The rooms that each room imports from."""
    found: dict[str, set[str]] = {}
    for module, targets in of_modules.items():
        found.setdefault(room(module), set()).update(room(target) for target in targets)
    return {name: targets - {name} for name, targets in found.items()}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room: one above the highest that it imports from.

    Raises:
        graphlib.CycleError: there is a circle.
    """
    found: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[target] for target in graph.get(name, ())), default=-1)
    return found


def arrows(graph: dict[str, set[str]]) -> dict[str, list[str]]:
    """Of the rooms that each room imports from those that no other import implies."""
    return {
        name: sorted(targets - {further for target in targets for further in _below(graph, target)})
        for name, targets in sorted(graph.items())
    }


def draw(path: Path) -> None:
    """Draw the rooms floor by floor, with an arrow for each import that is not implied by others."""
    from matplotlib.figure import Figure

    graph = rooms(imports())
    drawn = arrows(graph)
    floor_of = floors(graph)
    by_floor: dict[int, list[str]] = {}
    for name, floor in sorted(floor_of.items()):
        by_floor.setdefault(floor, []).append(name)
    place = {
        name: ((index + 0.5) / len(names), floor)
        for floor, names in by_floor.items()
        for index, name in enumerate(names)
    }
    widest = max(map(len, by_floor.values()))
    figure = Figure(figsize=(1.6 * widest, 1.2 * len(by_floor)))
    axes = figure.subplots()
    for name, targets in drawn.items():
        for target in targets:
            axes.annotate(
                "",
                xy=place[target],
                xytext=place[name],
                arrowprops={"arrowstyle": "->", "color": "#9aa5b1", "shrinkA": 12, "shrinkB": 12},
            )
    for name, (x, y) in place.items():
        folder = _is_folder(name)
        axes.text(
            x,
            y,
            f"{name}/" if folder else name,
            ha="center",
            va="center",
            weight="bold" if folder else "normal",
            bbox={"boxstyle": "round", "facecolor": "#dbeafe" if folder else "white", "edgecolor": "#64748b"},
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(by_floor) - 0.4)
    axes.axis("off")
    axes.set_title("wara_peft: each arrow points at what is imported; arrows that others imply are left out")
    figure.savefig(path, dpi=90, bbox_inches="tight", metadata={DRAWN: json.dumps(drawn)})


def _below(graph: dict[str, set[str]], name: str) -> set[str]:
    """Everything that a room imports from, directly or not."""
    found: set[str] = set()
    pending = list(graph.get(name, ()))
    while pending:
        target = pending.pop()
        if target not in found:
            found.add(target)
            pending.extend(graph.get(target, ()))
    return found


if __name__ == "__main__":
    draw(PICTURE)
