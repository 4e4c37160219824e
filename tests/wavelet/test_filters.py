"""Filters against PyWavelets."""

from __future__ import annotations

import pytest
import pywt

from wara_peft.wavelet import filters, max_useful_level, subbands


def test_filters_accept_every_orthogonal_name_and_no_other():
    for name in pywt.wavelist(kind="discrete"):
        wavelet = pywt.Wavelet(name)
        if wavelet.orthogonal:
            assert filters(name).lo == tuple(wavelet.rec_lo)
            assert filters(name).hi == tuple(wavelet.rec_hi)
        else:
            with pytest.raises(ValueError, match="not orthogonal"):
                filters(name)
    with pytest.raises(ValueError, match=r"'hara' is not a wavelet.*did you mean 'haar'"):
        filters("hara")
    with pytest.raises(ValueError, match="levels=0"):
        subbands(0)


def test_max_useful_level_is_that_of_pywavelets():
    assert [max_useful_level("haar", length) for length in (1, 2, 3, 8)] == [0, 1, 1, 3]
    assert max_useful_level("db4", 100) == pywt.dwt_max_level(100, pywt.Wavelet("db4"))
