"""Subband factors: layout of rows, views by name, and the scope in which they are constants."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from tests.references import synthesis_matrix
from wara_peft import frozen_factors
from wara_peft.forms.factors import IN_DIM, OUT_DIM, SubbandFactor
from wara_peft.forms.shared import SharedFactor

RANKS = {"aa2": 2, "ad2": 1, "dd2": 3, "ad1": 1, "da1": 2, "aa0": 2}


def filled(factor: SubbandFactor) -> SubbandFactor:
    for parameter in factor.parameters():
        nn.init.normal_(parameter)
    return factor.double()


@pytest.mark.parametrize("dim", [IN_DIM, OUT_DIM])
def test_rows_are_ordered_by_level_then_subband(dim):
    factor = filled(SubbandFactor("db2", 2, 13, RANKS, dim))
    letter = 1 if dim == IN_DIM else 0

    assert factor.subbands == ("aa2", "ad2", "dd2", "ad1", "da1", "aa0")
    assert factor.rank == 11
    assert {name: tuple(p.shape if dim == IN_DIM else p.T.shape) for name, p in factor.named_parameters()} == {
        "level0": (2, 13),
        "level1": (3, 7),
        "level2": (6, 4),
    }
    expected = []
    for name in factor.subbands:
        rows = factor.subband(name) if dim == IN_DIM else factor.subband(name).T
        level = int(name[2:])
        matrix = (
            torch.from_numpy(synthesis_matrix("db2", 13, level, name[letter])) if level else torch.eye(13).double()
        )
        expected.append(rows @ matrix.T)
    found = factor()
    torch.testing.assert_close(found if dim == IN_DIM else found.T, torch.cat(expected), atol=1e-12, rtol=0)


def test_subband_is_a_view_of_the_parameter():
    factor = SubbandFactor("haar", 2, 16, RANKS, IN_DIM)
    with torch.no_grad():
        factor.level2.zero_()
        factor.subband("dd2").fill_(1.0)
    assert factor.level2.tolist() == [[0.0] * 4] * 3 + [[1.0] * 4] * 3
    with pytest.raises(KeyError, match="No subband 'da2'"):
        factor.subband("da2")


@pytest.mark.parametrize("dim", [IN_DIM, OUT_DIM])
def test_shared_pair_serves_both_bands(dim):
    factor = filled(SharedFactor("db4", 1, 11, {"aa1": 3, "dd1": 3}, dim))
    pair = factor.level1 if dim == IN_DIM else factor.level1.T
    assert pair.shape == (3, 6)
    assert factor.subband("aa1").data_ptr() == factor.subband("dd1").data_ptr()
    expected = [pair @ torch.from_numpy(synthesis_matrix("db4", 11, 1, band)).T for band in "ad"]
    found = factor() if dim == IN_DIM else factor().T
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-12, rtol=0)


class TestFrozenFactors:
    def factor(self) -> SubbandFactor:
        return filled(SubbandFactor("haar", 1, 8, {"aa1": 1, "dd1": 1}, IN_DIM))

    def test_is_computed_once_and_undone(self):
        factor = self.factor()
        expected = factor().detach()
        with torch.no_grad(), frozen_factors(factor):
            first = factor()
            assert factor() is first
            torch.testing.assert_close(first, expected)
            factor.level1.zero_()
            assert factor() is first
        assert factor().abs().max() == 0

    def test_scopes_nest_and_end_with_an_exception(self):
        factor = self.factor()
        with torch.no_grad():
            with pytest.raises(KeyError), frozen_factors(factor):
                with frozen_factors(factor):
                    first = factor()
                assert factor() is first
                raise KeyError
            assert factor() is not factor()

    def test_refuses_gradients(self):
        factor = self.factor()
        with frozen_factors(factor), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
            factor()
        assert factor().requires_grad

    def test_copies_made_inside_are_outside(self):
        factor = self.factor()
        with torch.no_grad(), frozen_factors(factor):
            factor()
            copied = copy.deepcopy(factor)
            buffer = io.BytesIO()
            torch.save(factor, buffer)
            copied.level1.zero_()
            assert copied().abs().max() == 0
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        loaded.level1.data.zero_()
        assert loaded().abs().max() == 0

    def test_follows_moves_and_casts(self):
        factor = self.factor()
        with torch.inference_mode(), frozen_factors(factor):
            assert factor().dtype == torch.float64
            factor.float()
            assert factor().dtype == torch.float32
            factor.to("meta")
            assert factor().device.type == "meta"
