"""LowRankMultiheadAttention beside PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wara_peft.attention import LowRankMultiheadAttention

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 6, 12, 3
PADDING = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
BOOLS = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
BOOLS[1, 3:] = BOOLS[4, 1:4] = True
CAUSAL = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "padding as floats": {"key_padding_mask": torch.zeros(BATCH, KEYS).double().masked_fill(PADDING, -torch.inf)},
    "booleans": {"attn_mask": BOOLS},
    "floats": {"attn_mask": torch.linspace(-2, 2, QUERIES * KEYS, dtype=torch.float64).view(QUERIES, KEYS)},
    "by head": {"attn_mask": torch.linspace(-2, 2, 270, dtype=torch.float64).view(BATCH * HEADS, QUERIES, KEYS)},
    "booleans by head": {"attn_mask": (torch.arange(270) % 4 == 1).view(BATCH * HEADS, QUERIES, KEYS)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal and padding": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "is_causal": True},
    "floats and padding": {
        "attn_mask": torch.linspace(-2, 2, QUERIES * KEYS, dtype=torch.float64).view(QUERIES, KEYS),
        "key_padding_mask": torch.zeros(BATCH, KEYS).double().masked_fill(PADDING, -torch.inf),
    },
}


def states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = torch.randn(2, BATCH, KEYS, WIDTH, dtype=dtype)
    return torch.randn(BATCH, QUERIES, WIDTH, dtype=dtype), keys, values


def multihead(bias: bool = True, dropout: float = 0.0) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(WIDTH, HEADS, dropout, bias, batch_first=True)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)  # its biases are zero before training
    return attention.double()


class TestEqualToPyTorch:
    @pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("average", [True, False])
    def test_at_full_rank(self, masks: dict, need_weights: bool, average: bool) -> None:
        attention = multihead()
        low_rank = LowRankMultiheadAttention.from_multihead(attention, rank=WIDTH)
        arguments = {"need_weights": need_weights, "average_attn_weights": average, **masks}
        inputs = states()
        output, weights = low_rank(*inputs, **arguments)
        expected, expected_weights = attention(*inputs, **arguments)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
        if need_weights:
            torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-10)
        else:
            assert weights is expected_weights is None

    def test_in_single_precision(self) -> None:
        attention = multihead().float()
        low_rank = LowRankMultiheadAttention.from_multihead(attention, rank=WIDTH)
        inputs = states(torch.float32)
        for got, expected in zip(low_rank(*inputs), attention(*inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def test_at_a_rank_that_the_weights_have(self) -> None:
        attention = multihead()
        with torch.no_grad():
            for weight in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
                weight.copy_(weight[:, :2] @ weight[:2])
        low_rank = LowRankMultiheadAttention.from_multihead(attention, rank=2)
        inputs = states()
        torch.testing.assert_close(low_rank(*inputs)[0], attention(*inputs)[0], rtol=0, atol=1e-10)

    def test_without_biases(self) -> None:
        attention = multihead(bias=False)
        low_rank = LowRankMultiheadAttention.from_multihead(attention, rank=WIDTH)
        assert not [name for name, _ in low_rank.named_parameters() if "bias" in name]
        inputs = states()
        torch.testing.assert_close(low_rank(*inputs)[0], attention(*inputs)[0])

    @pytest.mark.parametrize("masks", [{}, {"key_padding_mask": PADDING[1]}, {"attn_mask": BOOLS}])
    def test_without_a_batch(self, masks: dict) -> None:
        attention = multihead()
        low_rank = LowRankMultiheadAttention.from_multihead(attention, rank=WIDTH)
        inputs = [tensor[0] for tensor in states()]
        for got, expected in zip(low_rank(*inputs, **masks), attention(*inputs, **masks), strict=True):
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("padded", [True, False])
    def test_causal_without_a_mask(self, need_weights: bool, padded: bool) -> None:
        """`nn.MultiheadAttention` refuses that; here it means what it says."""
        attention = multihead()
        low_rank = LowRankMultiheadAttention.from_multihead(attention, rank=WIDTH)
        inputs, padding = states(), PADDING if padded else None
        output, _ = low_rank(*inputs, padding, is_causal=True, need_weights=need_weights)
        expected, _ = attention(*inputs, padding, attn_mask=CAUSAL)
        torch.testing.assert_close(output, expected)

    def test_gradients(self) -> None:
        attention = multihead()
        low_rank = LowRankMultiheadAttention.from_multihead(attention, rank=WIDTH)
        gradients = []
        for module in (attention, low_rank):
            for need_weights in (True, False):
                inputs = [tensor.requires_grad_() for tensor in (t.clone() for t in self.fixed)]
                module(*inputs, PADDING, need_weights=need_weights)[0].square().sum().backward()
                gradients.append([tensor.grad for tensor in inputs])
        for other in gradients[1:]:
            for got, expected in zip(other, gradients[0], strict=True):
                torch.testing.assert_close(got, expected)
        assert (gradients[-1][1][PADDING] == 0).all()

    @property
    def fixed(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(5)
        return states()


class TestDropIn:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("norm_first", [True, False])
    def test_in_pytorchs_encoder_layer(self, training: bool, norm_first: bool) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, 0.0, batch_first=True, norm_first=norm_first).double()
        inputs = states()[1]
        with torch.set_grad_enabled(training):
            expected = layer.train()(inputs, src_key_padding_mask=PADDING)
            layer.self_attn = LowRankMultiheadAttention.from_multihead(layer.self_attn, rank=WIDTH)
            torch.testing.assert_close(layer.train(training)(inputs, src_key_padding_mask=PADDING), expected)

    def test_in_pytorchs_decoder_layer(self) -> None:
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 20, 0.0, batch_first=True).double()
        target, memory, _ = states()
        mask = CAUSAL[:, :QUERIES]
        expected = layer(target, memory, tgt_mask=mask, memory_key_padding_mask=PADDING)
        for name in ("self_attn", "multihead_attn"):
            setattr(layer, name, LowRankMultiheadAttention.from_multihead(getattr(layer, name), rank=WIDTH))
        torch.testing.assert_close(layer(target, memory, tgt_mask=mask, memory_key_padding_mask=PADDING), expected)

    def test_without_weights_the_fused_attention_is_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        fused = nn.functional.scaled_dot_product_attention

        def counted(*args, **kwargs):
            calls.append(kwargs["dropout_p"])
            return fused(*args, **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
        attention = LowRankMultiheadAttention(WIDTH, HEADS, 2, dropout=0.25).double()
        attention(*states(), need_weights=True)
        assert calls == []
        attention(*states(), need_weights=False)
        attention.eval()(*states(), need_weights=False)
        assert calls == [0.25, 0.0]

    def test_dropout_falls_on_the_weights_in_training_only(self) -> None:
        attention = LowRankMultiheadAttention(WIDTH, HEADS, 2, dropout=0.5).double()
        _, weights = attention(*states(), average_attn_weights=False)
        assert 0.25 < (weights == 0).double().mean() < 0.75
        _, weights = attention.eval()(*states(), average_attn_weights=False)
        assert (weights > 0).all()

    def test_bfloat16(self) -> None:
        attention = LowRankMultiheadAttention.from_multihead(multihead().bfloat16(), 4)
        inputs = [tensor.bfloat16() for tensor in states()]
        outputs = [attention(*inputs, need_weights=need_weights)[0] for need_weights in (True, False)]
        assert outputs[0].dtype == torch.bfloat16
        expected = attention.double()(*(tensor.double() for tensor in inputs))[0]
        for output in outputs:
            torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)

    def test_state_dict_moves_to_another(self) -> None:
        first, second = (LowRankMultiheadAttention(WIDTH, HEADS, 2).double() for _ in range(2))
        inputs = states()
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(*inputs)[0], second(*inputs)[0])


class TestParameters:
    @pytest.mark.parametrize(("rank", "resolved"), [(1, 1), (5, 5), (0.5, 8), (0.01, 1), (1.0, 16)])
    def test_counts(self, rank: float, resolved: int) -> None:
        """The break-even of a (32, 32) projection is 16."""
        attention = LowRankMultiheadAttention(32, 4, rank)
        assert attention.rank == resolved
        assert sum(p.numel() for p in attention.parameters()) == 8 * 32 * resolved + 4 * 32
        without = LowRankMultiheadAttention(32, 4, rank, bias=False)
        assert sum(p.numel() for p in without.parameters()) == 8 * 32 * resolved

    def test_initial_products_have_the_variance_of_pytorchs_weights(self) -> None:
        low_rank, attention = LowRankMultiheadAttention(256, 4, 64), nn.MultiheadAttention(256, 4)
        expected = [*attention.in_proj_weight.chunk(3), attention.out_proj.weight]
        projections = (low_rank.q_proj, low_rank.k_proj, low_rank.v_proj, low_rank.out_proj)
        for projection, weight in zip(projections, expected, strict=True):
            assert projection.weight.std().item() == pytest.approx(weight.std().item(), rel=0.05)
            assert (projection.bias == 0).all()

    def test_trainability_and_mode_are_kept(self) -> None:
        attention = multihead().eval()
        attention.in_proj_weight.requires_grad_(False)
        low_rank = LowRankMultiheadAttention.from_multihead(attention, 3)
        assert not low_rank.training and not low_rank.out_proj.down.training
        frozen = {name for name, parameter in low_rank.named_parameters() if not parameter.requires_grad}
        assert frozen == {f"{x}_proj.{part}.weight" for x in "qkv" for part in ("down", "up")}


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((10, 3, 2), "embed_dim=10 must be a multiple of num_heads=3"),
            ((0, 3, 2), "embed_dim=0 must be an int of at least 1"),
            ((12, 3, 13), "rank=13 of a linear layer with 12 inputs and 12 outputs must be an int from 1 to 12"),
            ((12, 3, 0), "rank=0 must be an int of at least 1"),
            ((12, 3, 1.5), "rank=1.5 must be an int"),
            ((12, 3, 2, 1.0), "dropout=1.0"),
        ],
    )
    def test_arguments(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LowRankMultiheadAttention(*arguments)

    @pytest.mark.parametrize(
        ("masks", "message"),
        [
            (
                {"attn_mask": torch.zeros(5, 5, dtype=torch.bool)},
                r"attn_mask has shape \(5, 5\).*\(5, 6\).*\(9, 5, 6\)",
            ),
            ({"attn_mask": torch.zeros(5, 6, dtype=torch.long)}, "attn_mask has dtype torch.int64"),
            ({"key_padding_mask": PADDING[:2]}, r"key_padding_mask has shape \(2, 6\)"),
            ({"key_padding_mask": torch.ones(3, 6, dtype=torch.bool)}, r"no position in rows \[0, 1, 2\]"),
        ],
    )
    def test_masks(self, masks: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LowRankMultiheadAttention(WIDTH, HEADS, 2).double()(*states(), **masks)

    def test_shapes(self) -> None:
        attention = LowRankMultiheadAttention(WIDTH, HEADS, 2).double()
        query, key, value = states()
        for inputs in ((query[:2], key, value), (query, key, value[:, 1:]), (query[..., 1:], key, value)):
            with pytest.raises(ValueError, match="query, key and value have shapes"):
                attention(*inputs)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_first": False}, "batch_first=False"),
            ({"kdim": 7}, "kdim, vdim, add_bias_kv or add_zero_attn"),
            ({"add_bias_kv": True}, "kdim, vdim, add_bias_kv or add_zero_attn"),
            ({"add_zero_attn": True}, "kdim, vdim, add_bias_kv or add_zero_attn"),
        ],
    )
    def test_attentions_that_cannot_be_replaced(self, options: dict, message: str) -> None:
        attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})
        with pytest.raises(ValueError, match=message):
            LowRankMultiheadAttention.from_multihead(attention, 2)
