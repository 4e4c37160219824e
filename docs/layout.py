"""Draws who imports whom in the package, top to bottom, from the source: `python docs/layout.py` writes layout.png."""

from __future__ import annotations

import ast
import json
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "wara_peft"
PICTURE = Path(__file__).with_suffix(".png")
DRAWN = "Description"
"""Where the picture's metadata say what is drawn in it."""
ORDER = (
    ("compiled",),
    ("factorized",),
    (
        "arguments",
        "messages",
        "kinds",
        "field_help",
        "field_types",
        "patterns",
        "registration",
        "model_card",
    ),
    ("refusals",),
    ("resolution", "enabling", "svd", "calibration", "moments", "heatmaps", "bypassed", "ordered_components"),
    ("wavelet", "attention"),
    ("forms",),
    ("config_checks", "lora_fields"),
    ("config",),
    ("own_forward", "kept_weight"),
    ("mergeable",),
    ("merging",),
    ("layer", "conv", "embedding", "experts", "factorized_linear", "disk"),
    ("components", "combine", "initialization", "rescaling", "optimizer_groups", "mixed_batch"),
    ("adapter_names", "in_full"),
    ("nested", "overwriting", "pad_token"),
    ("model",),
    (
        "diffusion",
        "export",
        "load_lora",
        "lora_view",
        "checkpoint_callback",
        "rank_shrinking",
        "inspection",
        "allocation",
        "compression",
    ),
    ("cli", "__init__"),
)
"""Rooms from the ground up. What stands on one line may import what stands on lines before it, and not the reverse."""


def module_name(path: Path) -> str:
    """`forms.tiny` for wara_peft/forms/tiny.py, `forms` for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports() -> dict[str, set[str]]:
    """The modules of the package that each of them imports, anywhere in its text: in functions and for types too."""
    paths = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        folder = path.relative_to(PACKAGE).parts[:-1]
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                targets |= {target for alias in node.names if (target := _resolve(node, alias.name, folder, paths))}
            elif isinstance(node, ast.Import):
                dotted = [alias.name.removeprefix("wara_peft.") for alias in node.names]
                targets |= {target for target in dotted if target in paths}
        found[name] = targets - {name}
    return found


def _resolve(node: ast.ImportFrom, imported: str, folder: tuple[str, ...], paths: dict[str, Path]) -> str | None:
    """The module that `from X import imported` takes something from, or None where it is not of the package."""
    if node.level:
        base = [*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]
    elif (node.module or "").split(".")[0] == "wara_peft":
        base = node.module.split(".")[1:] if node.module else []
    else:
        return None
    base = [part for part in base if part]
    candidates = (".".join([*base, imported]), ".".join(base) or "__init__")
    return next((name for name in candidates if name in paths), None)


def room(module: str) -> str:
    """The file or folder at the top of the package in which a module lies."""
    return module.split(".")[0]


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
        folder = (PACKAGE / name).is_dir()
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
