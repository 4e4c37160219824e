"""LoRC's rule for ranks: keys and values near the input keep more of their rank than those near the output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "k", "v", "k_lin", "v_lin")
LEAST_SHARE = 0.5
"""Share of rank for the block with the smallest product of condition numbers; the largest product has share 1."""


def block_numbers(names: Iterable[str]) -> dict[str, int]:
    """Give the number of each layer's block, which is the first number in the layer's name.

    Raises:
        ValueError: a name has no number.
    """
    found = {}
    for name in names:
        number = re.search(r"(?:^|\.)(\d+)\.", name)
        if number is None:
            raise ValueError(
                f"allocation='depth' needs layers in numbered blocks, and {name!r} is in none. Name keys and values "
                "in target_modules."
            )
        found[name] = int(number[1])
    return found


def depth_shares(targets: Mapping[str, nn.Module]) -> list[float]:
    """Give each layer's share of rank, from LEAST_SHARE to 1.

    The share grows with the logarithm of the product of condition numbers of all targets from its block to the top.
    """
    block_of = block_numbers(targets)
    logs: dict[int, float] = dict.fromkeys(sorted(set(block_of.values())), 0.0)
    for name, layer in targets.items():
        values = torch.linalg.svdvals(layer.get_parameter("weight").detach().double())
        # A singular weight has an infinite condition number. The clamp keeps the sums of logarithms finite.
        smallest = values[-1].clamp(min=values[0] * torch.finfo(values.dtype).eps)
        logs[block_of[name]] += float((values[0] / smallest).log()) if float(values[0]) > 0 else 0.0
    sums: dict[int, float] = {}
    total = 0.0
    for block in reversed(logs):
        total += logs[block]
        sums[block] = total
    span = max(sums.values()) - min(sums.values())
    of_block = {
        block: 1 - (max(sums.values()) - value) / span * (1 - LEAST_SHARE) if span > 0 else 1.0
        for block, value in sums.items()
    }
    return [of_block[block_of[name]] for name in targets]
