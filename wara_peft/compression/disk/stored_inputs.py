"""Files with the inputs of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import nn

from ...calibration.batches import arguments_of
from ...calibration.input_moments import MASKS, arguments_by_name, masks_of
from ...calibration.samples import may_hold_square_mask, samples_of
from .block_calls import Call
from .blockwise_model import BlockwiseModel

FILE = "{:06d}.pt"
"""Name of the file of a batch."""


class StoredInputs:
    """Batches for a `BlockModel` in files: hidden states and calls that lie before the blocks give.

    Args:
        folder: where the files are.
        device: device of the batches.
        number: number of the block.
        hidden: folder with the hidden states that the block gets; None if it is the first.
    """

    def __init__(self, folder: Path, device: torch.device, number: int = 0, hidden: Path | None = None) -> None:
        self.folder, self.device, self.number, self.hidden = folder, device, number, hidden
        self._count = len(list(folder.glob("*.pt")))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._batch, range(self._count))

    def _batch(self, index: int) -> dict[str, Any]:
        found = self._read(self.folder, index)
        hidden = found["hidden"] if self.hidden is None else self._read(self.hidden, index)
        batch = {"hidden": hidden, "call": Call(*found["calls"][self.number])}
        return batch if found["mask"] is None else {**batch, MASKS[0]: found["mask"]}

    def _read(self, folder: Path, index: int) -> Any:
        return torch.load(folder / FILE.format(index), map_location=self.device, weights_only=True)


def store_calls(model: BlockwiseModel, batches: Iterable[Any], folder: Path) -> None:
    """Run what lies before the blocks for all batches, and write what `StoredInputs` reads.

    Raises:
        ValueError: there are no batches, or a block gets an argument that no file can hold.
    """
    whole = cast(nn.Module, model.model)
    count = 0
    for batch in batches:
        batch = send_to_device(batch, model.device)
        for part in samples_of(whole, batch) if may_hold_square_mask(batch) else (batch,):
            args, kwargs = arguments_of(part)
            whole_call = Call(args, kwargs)
            whole_call.check_storable(type(whole).__name__)
            hidden, calls = model.calls(args, kwargs)
            mask = masks_of(arguments_by_name(whole, args, kwargs)).get(MASKS[0])
            # The last call is that of the whole model, for a `RestModel`.
            stored = [(call.args, call.kwargs) for call in (*calls, whole_call)]
            entry = {"hidden": hidden, "calls": stored, "mask": mask}
            torch.save(entry, folder / FILE.format(count))
            count += 1
    if not count:
        raise ValueError("batches gives no batches.")
