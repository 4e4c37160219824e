"""`calibrate` in each of some processes, with batches of its own, for `test_calibration`; takes a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from tests.compression.models import llama
from wara_peft.compression import calibrate, save_statistics


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = llama().double()
    # 11 samples in batches of 2: six batches, of which the last is smaller, so the processes get 6 and 5 samples.
    masks = torch.arange(8) < torch.randint(3, 9, (11, 1))
    samples = [
        {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}
        for ids, mask in zip(torch.randint(3, 40, (11, 8)), masks.long(), strict=True)
    ]
    for name, count in (("uneven", 11), ("few", 1)):
        loader = accelerator.prepare(DataLoader(samples[:count], batch_size=2))
        kinds = ("inputs", "gradients", "fisher")
        # The limit makes several groups, so the batches run several times.
        found = calibrate(model, loader, kinds, max_bytes=40_000, show_progress_bar=False)
        save_statistics(folder / f"{name}-{accelerator.process_index}", found)
        shared = calibrate(model, loader, kinds, path=folder / f"{name}-shared", show_progress_bar=False)
        assert shared.keys() == found.keys()
        assert loader.batch_sampler is None or getattr(loader.batch_sampler, "even_batches", True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
