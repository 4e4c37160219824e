"""LinformerAttention beside PyTorch's own attention, and against its equation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wara_peft.attention import LinformerAttention

BATCH, LENGTH, WIDTH, HEADS = 3, 6, 12, 3
PADDING = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
SHARING = ("none", "headwise", "key-value", "layerwise")


def linformer(max_length: int = 8, k: int = 4, sharing: str = "none", **options) -> LinformerAttention:
    attention = LinformerAttention(WIDTH, HEADS, max_length, k, sharing, **options).double()
    for name, parameter in attention.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)  # biases start at zero, and would hide what they do at padding
    return attention


def states() -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, BATCH, LENGTH, WIDTH, dtype=torch.float64)
    return query, key, value


def loop_reference(
    attention: LinformerAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
) -> Tensor:
    """head_i = softmax(Q_i (E_iᵀ K_i)ᵀ / √(d/h)) (F_iᵀ V_i), head by head, over the keys that are no padding."""
    size = WIDTH // HEADS
    output = torch.zeros_like(query)
    for row in range(len(query)):
        kept = [t for t in range(key.shape[1]) if padding is None or not padding[row, t]]
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            of_keys = attention.E[head] if attention.E.dim() == 3 else attention.E
            of_values = of_keys if attention.F is None else attention.F
            of_values = of_values[head] if of_values.dim() == 3 else of_values
            q, k, v = (
                (states @ layer.weight.T + layer.bias)[:, part]
                for states, layer in (
                    (query[row], attention.q_proj),
                    (key[row, kept], attention.k_proj),
                    (value[row, kept], attention.v_proj),
                )
            )
            mixed_keys, mixed_values = of_keys[kept].T @ k, of_values[kept].T @ v
            scores = (q @ mixed_keys.T / size**0.5).exp()
            heads.append(scores / scores.sum(1, keepdim=True) @ mixed_values)
        output[row] = torch.cat(heads, 1) @ attention.out_proj.weight.T + attention.out_proj.bias
    return output


class TestEquation:
    @pytest.mark.parametrize("sharing", SHARING)
    @pytest.mark.parametrize("padding", [None, PADDING, PADDING.flip(1)], ids=["none", "right", "left"])
    @pytest.mark.parametrize("need_weights", [True, False])
    def test_equal_to_a_loop(self, sharing: str, padding: Tensor | None, need_weights: bool) -> None:
        attention, inputs = linformer(sharing=sharing), states()
        output, weights = attention(*inputs, padding, need_weights=need_weights)
        torch.testing.assert_close(output, loop_reference(attention, *inputs, padding), rtol=0, atol=1e-12)
        if need_weights:
            assert weights.shape == (BATCH, LENGTH, 4)
            torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, LENGTH, dtype=torch.float64))

    @pytest.mark.parametrize("sharing", SHARING)
    @pytest.mark.parametrize("average", [True, False])
    def test_with_identities_equal_to_pytorchs(self, sharing: str, average: bool) -> None:
        attention = linformer(LENGTH, LENGTH, sharing)
        reference = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
        with torch.no_grad():
            for projection in (attention.E, attention.F):
                if projection is not None:
                    projection.copy_(torch.eye(LENGTH))
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            reference.in_proj_weight.copy_(torch.cat([layer.weight for layer in projections]))
            reference.in_proj_bias.copy_(torch.cat([layer.bias for layer in projections]))
        reference.out_proj.load_state_dict(attention.out_proj.state_dict())
        inputs = states()
        expected = reference(*inputs, average_attn_weights=average)
        for got, wanted in zip(attention(*inputs, average_attn_weights=average), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        without, _ = attention(*inputs, need_weights=False)
        torch.testing.assert_close(without, expected[0], rtol=0, atol=1e-12)

    def test_padding_gets_no_gradient(self) -> None:
        query, key, value = (tensor.requires_grad_() for tensor in states())
        linformer()(query, key, value, PADDING)[0].square().sum().backward()
        for states_ in (key, value):
            assert (states_.grad[PADDING] == 0).all()
            assert (states_.grad[~PADDING] != 0).any()

    def test_without_a_batch(self) -> None:
        attention, inputs = linformer(), states()
        expected, expected_weights = attention(*inputs, PADDING)
        output, weights = attention(*(tensor[1] for tensor in inputs), PADDING[1])
        torch.testing.assert_close(output, expected[1])
        torch.testing.assert_close(weights, expected_weights[1])

    def test_without_weights_the_fused_attention_is_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: torch.full_like(q, 7.0)
        )
        attention = linformer()
        output, _ = attention(*states(), need_weights=False)
        expected = attention.out_proj(torch.full((BATCH, LENGTH, WIDTH), 7.0, dtype=torch.float64))
        assert torch.equal(output, expected)


class TestParameters:
    @pytest.mark.parametrize(
        ("sharing", "expected"),
        [("none", 2 * HEADS * 8 * 4), ("headwise", 2 * 8 * 4), ("key-value", 8 * 4), ("layerwise", 8 * 4)],
    )
    @pytest.mark.parametrize("bias", [True, False])
    def test_counts(self, sharing: str, expected: int, bias: bool) -> None:
        attention = LinformerAttention(WIDTH, HEADS, 8, 4, sharing, bias=bias)
        projections = 4 * (WIDTH * WIDTH + bias * WIDTH)
        assert sum(p.numel() for p in attention.parameters()) == projections + expected

    def test_k_is_256_by_default(self) -> None:
        assert LinformerAttention(WIDTH, HEADS, 300, sharing="key-value").E.shape == (300, 256)

    def test_layers_share_one_projection(self) -> None:
        first = linformer(sharing="layerwise")
        layers = nn.ModuleList([first, linformer(sharing="layerwise", projection=first.E)])
        own = 4 * (WIDTH * WIDTH + WIDTH)
        assert sum(p.numel() for p in layers.parameters()) == 2 * own + 8 * 4
        inputs = states()
        sum(layer(*inputs)[0].square().sum() for layer in layers).backward()
        together = first.E.grad.clone()
        first.E.grad = None
        layers[1](*inputs)[0].square().sum().backward()
        assert not torch.equal(first.E.grad, together)
        assert first.E.grad.abs().max() > 0

    def test_sharing_keeps_the_values_of_the_first_layer(self) -> None:
        first = LinformerAttention(WIDTH, HEADS, 8, 4, "layerwise")
        before = first.E.detach().clone()
        LinformerAttention(WIDTH, HEADS, 8, 4, "layerwise", projection=first.E)
        assert torch.equal(first.E, before)

    def test_state_dict_moves_to_another(self) -> None:
        first, second, inputs = linformer(), linformer(), states()
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(*inputs)[0], second(*inputs)[0])


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_length": 64}, "k=256 is more than max_length=64"),
            ({"max_length": 8, "k": 0}, "k=0 must be an int of at least 1"),
            ({"max_length": 8, "k": 4, "sharing": "all"}, "sharing='all' is unknown; use one of 'none', 'headwise'"),
            (
                {"max_length": 8, "k": 4, "projection": nn.Parameter(torch.zeros(8, 4))},
                r"projection of shape \(8, 4\) with sharing='none'",
            ),
            (
                {"max_length": 8, "k": 4, "sharing": "layerwise", "projection": nn.Parameter(torch.zeros(8, 3))},
                r"projection of shape \(8, 3\) .* \(8, 4\)",
            ),
        ],
    )
    def test_arguments(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LinformerAttention(WIDTH, HEADS, **options)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"attn_mask": torch.zeros(LENGTH, LENGTH, dtype=torch.bool)}, "takes no attn_mask and cannot be causal"),
            ({"is_causal": True}, "takes no attn_mask and cannot be causal"),
            ({"key_padding_mask": torch.ones_like(PADDING)}, r"no position in rows \[0, 1, 2\]"),
        ],
    )
    def test_masks(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            linformer()(*states(), **arguments)

    def test_longer_input(self) -> None:
        with pytest.raises(ValueError, match="The keys have length 6, more than max_length=5"):
            linformer(5)(*states())
