"""Sizes and names of subbands against PyWavelets."""

from __future__ import annotations

import numpy as np
import pytest
import pywt

from wara_peft.wavelet import axis_sizes, subbands

each_levels = pytest.mark.parametrize("levels", [1, 2, 3])


@each_levels
def test_subbands_have_the_shapes_of_pywavelets(levels):
    for m, n in ((1, 1), (5, 8), (12, 7)):
        current = np.zeros((m, n))
        for level in range(1, levels + 1):
            current = pywt.dwtn(current, "haar", mode="periodization")
            named = {band.name: band.shape(m, n) for band in subbands(levels) if band.level == level}
            # pywt's coarser approximations are transformed further, so only the coarsest is named.
            assert named == {f"{name}{level}": c.shape for name, c in current.items() if f"{name}{level}" in named}
            assert len(named) == (4 if level == levels else 3)
            current = current["aa"]
    assert subbands(levels)[-1].name == "aa0"
    assert subbands(levels)[-1].shape(5, 8) == (5, 8)


@each_levels
def test_axis_sizes_round_up(levels):
    assert axis_sizes(13, levels) == (13, 7, 4, 2)[: levels + 1]
