"""The poolings that compare_attention.py compares LAMA with, each against its equations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.examples.test_examples import example

baselines = example("attention_baselines")
PADDING = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)


def test_additive() -> None:
    pooling = baselines.AdditivePooling(8).double()
    hidden = torch.randn(3, 6, 8, dtype=torch.float64)
    pooled, weights = pooling(hidden, PADDING)
    for row, length in enumerate((6, 3, 1)):
        scores = [
            pooling.context @ torch.tanh(pooling.transform.weight @ hidden[row, t] + pooling.transform.bias)
            for t in range(length)
        ]
        expected = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
        torch.testing.assert_close(weights[row, 0, :length], expected)
        torch.testing.assert_close(pooled[row, 0], expected @ hidden[row, :length])
    assert sum(p.numel() for p in pooling.parameters()) == 8 * 8 + 8 + 8


def test_structured() -> None:
    pooling = baselines.StructuredSelfAttentionPooling(8, 3, 5).double()
    hidden = torch.randn(3, 6, 8, dtype=torch.float64)
    pooled, weights = pooling(hidden, PADDING)
    for row, length in enumerate((6, 3, 1)):
        states = hidden[row, :length]
        scores = pooling.head_layer.weight @ torch.tanh(pooling.hidden_layer.weight @ states.T)  # (k, T)
        expected = scores.exp() / scores.exp().sum(1, keepdim=True)
        torch.testing.assert_close(weights[row, :, :length], expected)
        torch.testing.assert_close(pooled[row], expected @ states)
    assert sum(p.numel() for p in pooling.parameters()) == 5 * 8 + 3 * 5


def test_transformer_is_the_mean_of_pytorchs_layer() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    pooling = baselines.TransformerPooling(attention, dim_feedforward=12)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    layer.load_state_dict(pooling.layer.state_dict())
    assert pooling.layer.self_attn is attention
    pooling, layer = pooling.double().eval(), layer.double().eval()
    hidden = torch.randn(3, 6, 8, dtype=torch.float64)
    for row, length in enumerate((6, 3, 1)):
        expected = layer(hidden[row : row + 1, :length])[0].mean(0)
        torch.testing.assert_close(pooling(hidden, PADDING)[0][row, 0], expected)


def test_transformer_wants_batch_first() -> None:
    with pytest.raises(ValueError, match="make it with batch_first=True"):
        baselines.TransformerPooling(nn.MultiheadAttention(8, 2))


@pytest.mark.parametrize("make", [baselines.AdditivePooling, baselines.StructuredSelfAttentionPooling])
def test_sizes(make: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="embed_dim=0 must be an int of at least 1"):
        make(0)
