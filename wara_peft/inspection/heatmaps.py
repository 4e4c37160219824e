"""Draws heatmaps with a row for each module and a column for each subband."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_heatmaps(
    path: str | os.PathLike[str],
    title: str,
    modules: Sequence[str],
    subbands: Sequence[str],
    values: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    """Draw heatmaps of modules × subbands side by side into an image file.

    The file appears, or replaces an old one, only when it is complete.

    Args:
        path: the file.
        title: the text above all heatmaps.
        modules, subbands: names of the rows and of the columns.
        values: for each heatmap, by its title, its values: a list of rows, one for each module. Each is at least 0.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: the file's folder is missing.
        ValueError: matplotlib does not know the ending of the file's name, or the name is that of a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name an image file.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(target.parent)!r} to write {target.name!r} into.")
    # matplotlib is an optional dependency. `Figure`, unlike `pyplot`, needs no display and keeps no global state.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install 'wara-peft[plot]'") from error
    width = len(values) * (2.2 + 0.7 * len(subbands)) + 0.06 * max(map(len, modules), default=0)
    figure = Figure(figsize=(1.3 + width, 1.8 + min(0.22 * len(modules), 60.0)), layout="constrained")
    figure.suptitle(title)
    side_by_side = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(side_by_side, values.items(), strict=True):
        image = axes.imshow(rows, aspect="auto", vmin=0.0, cmap="viridis")
        axes.set_xticks(range(len(subbands)), subbands)
        # matplotlib would read a name with two dollar signs as a formula, and may fail on it.
        axes.set_yticks(range(len(modules)), modules, fontsize=7, parse_math=False)
        axes.set_xlabel("subband (out axis, in axis, level)")
        axes.set_title(name)
        figure.colorbar(image, ax=axes)
    # Drawing into memory first finds an unknown image format before any file is made.
    drawn = io.BytesIO()
    figure.savefig(drawn, format=target.suffix.removeprefix(".") or None, dpi=120)
    # In the same folder, since a file can only be renamed atomically within one file system.
    temporary = target.with_name(f".{uuid.uuid4().hex[:8]}.{target.name}")
    try:
        temporary.write_bytes(drawn.getvalue())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
