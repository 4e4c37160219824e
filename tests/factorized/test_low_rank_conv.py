"""Factorised convolutions beside the one convolution and NumPy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from wara_peft.factorized import LowRankConv, factorize_conv


def broken() -> nn.Conv2d:
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.data[0, 0] = torch.nan
    return conv


CONVS = {
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
    "2d same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "2d valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "2d circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "3d": lambda: nn.Conv3d(2, 5, 2),
}


def conv_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    conv = CONVS[name]().double()
    return conv, torch.randn(2, conv.in_channels, *[9] * (conv.weight.dim() - 2), dtype=torch.float64)


@pytest.mark.parametrize("name", CONVS)
def test_full_rank_reproduces_the_convolution(name: str) -> None:
    conv, x = conv_of(name)
    most = min(len(conv.weight), conv.weight[0].numel())
    low_rank = factorize_conv(conv, most)
    torch.testing.assert_close(low_rank(x), conv(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(low_rank.dense()(x), conv(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_error_is_eckart_youngs_of_the_unfolded_weight(rank: int) -> None:
    conv, x = conv_of("2d")
    matrix = conv.weight.detach().numpy().reshape(6, -1)
    low_rank = factorize_conv(conv, rank)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    expected = left[:, :rank] * values[:rank] @ right[:rank]
    np.testing.assert_allclose(low_rank.weight.detach().numpy().reshape(6, -1), expected, atol=1e-12)
    torch.testing.assert_close(low_rank(x), low_rank.dense()(x), rtol=0, atol=1e-12)


def test_bias_mode_dtype_and_gradients_are_kept() -> None:
    conv = CONVS["2d same"]().bfloat16().eval()
    conv.weight.requires_grad_(False)
    low_rank = factorize_conv(conv, 2)
    assert not low_rank.training and {value.dtype for value in low_rank.parameters()} == {torch.bfloat16}
    assert torch.equal(low_rank.bias, conv.bias) and low_rank.bias.requires_grad
    assert [value.requires_grad for value in low_rank.parameters()].count(True) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: factorize_conv(nn.Conv2d(4, 4, 3, groups=2), 1), "groups=2"),
        (lambda: LowRankConv(nn.Conv2d(4, 6, 3), 7), r"rank=7 .*\(6, 4, 3, 3\) must be an int from 1 to 6"),
        (lambda: factorize_conv(broken(), 2), "its weight holds NaN or infinity"),
    ],
)
def test_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
