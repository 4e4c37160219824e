"""Pictures of modules × subbands."""

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
    """Draw heatmaps of modules × subbands beside each other into an image file.

    The file appears, or takes the place of an old one, when it is complete.

    Args:
        path: the file.
        title: stands above them.
        modules, subbands: names of the rows and of the columns.
        values: one heatmap each, by its own title: a row for each module, at least 0.

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
        # Names come from elsewhere, and are no mathematics.
        axes.set_yticks(range(len(modules)), modules, fontsize=7, parse_math=False)
        axes.set_xlabel("subband (out axis, in axis, level)")
        axes.set_title(name)
        figure.colorbar(image, ax=axes)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=target.suffix.removeprefix(".") or None, dpi=120)
    temporary = target.with_name(f".{uuid.uuid4().hex[:8]}.{target.name}")
    try:
        temporary.write_bytes(drawn.getvalue())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
