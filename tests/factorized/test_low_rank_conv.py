"""Factorised convolutions beside the one convolution and NumPy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from wara_peft.factorized import LowRankConv, SpatialLowRankConv2d, factorize_conv
from wara_peft.factorized.low_rank_conv import folded, unfolded

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


@pytest.mark.parametrize("name", ["2d", "2d same", "2d valid"])
def test_spatial(name: str) -> None:
    conv, x = conv_of(name)
    height, width = conv.kernel_size
    full = factorize_conv(conv, min(4 * height, 6 * width), "spatial")
    torch.testing.assert_close(full(x), conv(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(full.dense()(x), conv(x), rtol=0, atol=1e-12)
    assert full.vertical.weight.shape == (full.rank, 4, height, 1)
    assert full.horizontal.weight.shape == (6, full.rank, 1, width)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("rank", [1, 3])
def test_error_is_eckart_youngs_of_the_unfolded_weight(scheme: str, rank: int) -> None:
    conv, x = conv_of("2d")
    weight = conv.weight.detach().numpy()
    if scheme == "channel":
        matrix = weight.reshape(6, -1)
    else:
        matrix = np.array(
            [[weight[m, n, h, w] for m in range(6) for w in range(2)] for n in range(4) for h in range(3)]
        )
    assert np.array_equal(unfolded(conv.weight.detach(), scheme).numpy(), matrix)
    assert torch.equal(folded(unfolded(conv.weight, scheme), conv.weight.shape, scheme), conv.weight)
    low_rank = factorize_conv(conv, rank, scheme)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    expected = left[:, :rank] * values[:rank] @ right[:rank]
    np.testing.assert_allclose(unfolded(low_rank.weight.detach(), scheme).numpy(), expected, atol=1e-12)
    torch.testing.assert_close(low_rank(x), low_rank.dense()(x), rtol=0, atol=1e-12)


def test_bias_mode_dtype_and_gradients_are_kept() -> None:
    conv = CONVS["2d same"]().bfloat16().eval()
    conv.weight.requires_grad_(False)
    for scheme in ("channel", "spatial"):
        low_rank = factorize_conv(conv, 2, scheme)
        assert not low_rank.training and {value.dtype for value in low_rank.parameters()} == {torch.bfloat16}
        assert torch.equal(low_rank.bias, conv.bias) and low_rank.bias.requires_grad
        assert [value.requires_grad for value in low_rank.parameters()].count(True) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: factorize_conv(nn.Conv2d(4, 4, 3, groups=2), 1), "groups=2"),
        (lambda: LowRankConv(nn.Conv2d(4, 6, 3), 7), r"rank=7 .*\(6, 4, 3, 3\) must be 1 to 6"),
        (lambda: SpatialLowRankConv2d(nn.Conv2d(4, 6, 3), 13), "must be 1 to 12"),
        (lambda: factorize_conv(CONVS["2d circular"](), 1, "spatial"), "padding_mode='zeros'"),
        (lambda: factorize_conv(CONVS["1d"](), 1, "spatial"), "is for nn.Conv2d"),
    ],
)
def test_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
