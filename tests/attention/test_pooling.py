"""What holds for all poolings: padding, shapes, errors; and the penalty."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wara_peft.attention import (
    AdditivePooling,
    LinformerAttention,
    LowRankMultiheadAttention,
    LowRankMultiHeadPooling,
    StructuredSelfAttentionPooling,
    TransformerPooling,
    orthogonality_penalty,
)

POOLINGS = {
    "lama": lambda: LowRankMultiHeadPooling(8, 3),
    "lama, mean input": lambda: LowRankMultiHeadPooling(8, 3, "mean_input"),
    "additive": lambda: AdditivePooling(8),
    "structured": lambda: StructuredSelfAttentionPooling(8, 3, 5),
    "transformer": lambda: TransformerPooling(nn.MultiheadAttention(8, 2, batch_first=True)),
    "low-rank transformer": lambda: TransformerPooling(LowRankMultiheadAttention(8, 2, 2)),
    "linformer": lambda: TransformerPooling(LinformerAttention(8, 2, 6, 3)),
}
MASK = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.fixture(params=POOLINGS.values(), ids=POOLINGS.keys())
def pooling(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double().eval()


class TestPadding:
    def test_weight_is_exactly_zero_and_rows_sum_to_one(self, pooling: nn.Module) -> None:
        pooled, weights = pooling(torch.randn(3, 6, 8, dtype=torch.float64), MASK)
        assert pooled.shape == (3, pooling.num_heads, 8)
        assert weights.shape == (3, pooling.num_heads, 6)
        assert (weights.transpose(1, 2)[MASK] == 0).all()
        assert (weights.transpose(1, 2)[~MASK] > 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, pooling.num_heads, dtype=torch.float64))

    @pytest.mark.parametrize("stored", [1e30, torch.inf, torch.nan])
    def test_no_gradient_and_no_effect_whatever_is_stored_there(self, pooling: nn.Module, stored: float) -> None:
        hidden = torch.randn(3, 6, 8, dtype=torch.float64)
        results = []
        for value in (0.0, stored):
            leaf = hidden.masked_fill(MASK[..., None], value).requires_grad_()
            pooling.zero_grad()
            pooled, _ = pooling(leaf, MASK)
            pooled.square().sum().backward()
            gradients = [parameter.grad.clone() for parameter in pooling.parameters()]
            results.append([pooled.detach(), leaf.grad, *gradients])
        assert (results[1][1][MASK] == 0).all()
        assert results[1][1][~MASK].abs().max() > 0
        for plain, other in zip(*results, strict=True):
            assert torch.equal(plain, other)

    def test_same_as_without_padding(self, pooling: nn.Module) -> None:
        hidden = torch.randn(3, 6, 8, dtype=torch.float64)
        pooled, weights = pooling(hidden, MASK)
        for row, length in enumerate((6, 3, 1)):
            alone, weights_alone = pooling(hidden[row : row + 1, :length])
            torch.testing.assert_close(pooled[row], alone[0])
            torch.testing.assert_close(weights[row, :, :length], weights_alone[0])

    def test_all_padding_is_an_error(self, pooling: nn.Module) -> None:
        mask = torch.zeros(3, 6, dtype=torch.bool)
        mask[1] = True
        with pytest.raises(ValueError, match=r"no position in rows \[1\].*Drop these rows"):
            pooling(torch.randn(3, 6, 8, dtype=torch.float64), mask)


class TestInterface:
    def test_weights_are_those_of_the_sum(self, pooling: nn.Module) -> None:
        hidden = torch.randn(3, 6, 8, dtype=torch.float64)
        pooled, weights = pooling(hidden, MASK)
        of = pooling.layer(hidden, src_key_padding_mask=MASK) if isinstance(pooling, TransformerPooling) else hidden
        torch.testing.assert_close(torch.einsum("bkt,btd->bkd", weights, of), pooled)
        without, none = pooling(hidden, MASK, need_weights=False)
        assert none is None
        assert torch.equal(without, pooled)

    @pytest.mark.parametrize(
        ("shape", "mask", "message"),
        [
            ((6, 8), None, r"hidden has shape \(6, 8\).*embed_dim=8"),
            ((3, 6, 7), None, r"hidden has shape \(3, 6, 7\).*embed_dim=8"),
            ((3, 0, 8), None, "length 0"),
            ((3, 6, 8), torch.zeros(3, 5, dtype=torch.bool), r"shape \(3, 5\).*\(3, 6\)"),
            ((3, 6, 8), torch.ones(3, 6, dtype=torch.long), "attention_mask == 0"),
            ((3, 6, 8), torch.ones(3, 6), "0 and -inf only"),
        ],
    )
    def test_errors(self, pooling: nn.Module, shape: tuple[int, ...], mask: Tensor | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pooling(torch.randn(shape, dtype=torch.float64), mask)

    def test_float_mask_means_the_same(self, pooling: nn.Module) -> None:
        hidden = torch.randn(3, 6, 8, dtype=torch.float64)
        floats = torch.zeros(3, 6, dtype=torch.float64).masked_fill(MASK, -torch.inf)
        assert torch.equal(pooling(hidden, floats)[0], pooling(hidden, MASK)[0])

    def test_traced_without_graph_breaks(self, pooling: nn.Module) -> None:
        hidden = torch.randn(3, 6, 8, dtype=torch.float64)
        traced = torch.compile(pooling, fullgraph=True, backend="eager")
        torch.testing.assert_close(traced(hidden, MASK)[0], pooling(hidden, MASK)[0])


class TestEquations:
    def test_additive(self) -> None:
        pooling = AdditivePooling(8).double()
        hidden = torch.randn(3, 6, 8, dtype=torch.float64)
        pooled, weights = pooling(hidden, MASK)
        for row, length in enumerate((6, 3, 1)):
            scores = [
                pooling.context @ torch.tanh(pooling.transform.weight @ hidden[row, t] + pooling.transform.bias)
                for t in range(length)
            ]
            expected = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            torch.testing.assert_close(weights[row, 0, :length], expected)
            torch.testing.assert_close(pooled[row, 0], expected @ hidden[row, :length])
        assert sum(p.numel() for p in pooling.parameters()) == 8 * 8 + 8 + 8

    def test_structured(self) -> None:
        pooling = StructuredSelfAttentionPooling(8, 3, 5).double()
        hidden = torch.randn(3, 6, 8, dtype=torch.float64)
        pooled, weights = pooling(hidden, MASK)
        for row, length in enumerate((6, 3, 1)):
            states = hidden[row, :length]
            scores = pooling.head_layer.weight @ torch.tanh(pooling.hidden_layer.weight @ states.T)  # (k, T)
            expected = scores.exp() / scores.exp().sum(1, keepdim=True)
            torch.testing.assert_close(weights[row, :, :length], expected)
            torch.testing.assert_close(pooled[row], expected @ states)
        assert sum(p.numel() for p in pooling.parameters()) == 5 * 8 + 3 * 5

    def test_transformer_is_the_mean_of_pytorchs_layer(self) -> None:
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        pooling = TransformerPooling(attention, dim_feedforward=12)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        layer.load_state_dict(pooling.layer.state_dict())
        assert pooling.layer.self_attn is attention
        pooling, layer = pooling.double().eval(), layer.double().eval()
        hidden = torch.randn(3, 6, 8, dtype=torch.float64)
        for row, length in enumerate((6, 3, 1)):
            expected = layer(hidden[row : row + 1, :length])[0].mean(0)
            torch.testing.assert_close(pooling(hidden, MASK)[0][row, 0], expected)

    def test_transformer_wants_batch_first(self) -> None:
        with pytest.raises(ValueError, match="make it with batch_first=True"):
            TransformerPooling(nn.MultiheadAttention(8, 2))

    @pytest.mark.parametrize("make", [AdditivePooling, StructuredSelfAttentionPooling])
    def test_sizes(self, make: type[nn.Module]) -> None:
        with pytest.raises(ValueError, match="embed_dim=0 must be an int of at least 1"):
            make(0)


class TestPenalty:
    def test_equal_to_sums_over_entries(self) -> None:
        weights = torch.randn(4, 3, 5, dtype=torch.float64).softmax(-1)
        expected = sum(
            (sum(weights[b, i, t] * weights[b, j, t] for t in range(5)) - float(i == j)) ** 2
            for b in range(4)
            for i in range(3)
            for j in range(3)
        )
        torch.testing.assert_close(orthogonality_penalty(weights), expected / 4)

    def test_zero_where_each_head_has_a_position_of_its_own(self) -> None:
        assert orthogonality_penalty(torch.eye(3, 5).expand(2, 3, 5)) == 0

    def test_wrong_shape(self) -> None:
        with pytest.raises(ValueError, match=r"weights has shape \(3, 5\)"):
            orthogonality_penalty(torch.zeros(3, 5))
