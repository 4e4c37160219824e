"""LAMA's pooling against a float64 loop written from its equations, and its parameter counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wara_peft.attention import LowRankMultiHeadPooling


def loop_reference(
    pooling: LowRankMultiHeadPooling, hidden: Tensor, mask: Tensor | None, inputs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The equations, one sequence, position and head at a time, over the tokens that are no padding."""
    values = {name: value.detach().double().numpy() for name, value in pooling.state_dict().items()}
    batch, length, width = hidden.shape
    heads = pooling.num_heads
    pooled = torch.zeros(batch, heads, width, dtype=torch.float64)
    weights = torch.zeros(batch, heads, length, dtype=torch.float64)
    for row in range(batch):
        kept = [t for t in range(length) if mask is None or not mask[row, t]]
        states = {t: hidden[row, t].detach().double().numpy() for t in kept}
        if "context" in values:
            context = values["context"]
        else:
            source = hidden if inputs is None else inputs
            context = sum(source[row, t].double().numpy() for t in kept) / len(kept)
        normalised = {}
        for t in kept:
            u = [
                math.tanh(sum(values["transform.weight"][i] * states[t]) + values["transform.bias"][i])
                for i in range(width)
            ]
            f = [
                math.tanh(sum(values["P"][:, head] * context) * sum(values["Q"][:, head] * u)) for head in range(heads)
            ]
            norm = math.sqrt(sum(value**2 for value in f))
            normalised[t] = [value / max(norm, pooling.eps) for value in f]
        for head in range(heads):
            total = sum(math.exp(normalised[t][head]) for t in kept)
            for t in kept:
                weights[row, head, t] = math.exp(normalised[t][head]) / total
                pooled[row, head] += weights[row, head, t] * torch.from_numpy(states[t])
    return pooled, weights


def right_padding(lengths: list[int], length: int) -> Tensor:
    return torch.arange(length)[None, :] >= torch.tensor(lengths)[:, None]


MASKS = {
    "none": None,
    "right": right_padding([5, 3, 4], 5),
    "left": right_padding([5, 3, 4], 5).flip(1),
    "all but one": right_padding([1, 1, 5], 5),
    "holes": torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool),
}


class TestEquations:
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
    @pytest.mark.parametrize("context", ["learned", "mean_input"])
    @pytest.mark.parametrize("heads", [1, 2, 4, 9])
    def test_equal_to_a_loop(self, mask: Tensor | None, context: str, heads: int) -> None:
        pooling = LowRankMultiHeadPooling(6, heads, context).double()
        hidden = torch.randn(3, 5, 6, dtype=torch.float64)
        pooled, weights = pooling(hidden, mask)
        expected_pooled, expected_weights = loop_reference(pooling, hidden, mask)
        torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-12)
        torch.testing.assert_close(pooled, expected_pooled, rtol=0, atol=1e-12)

    def test_context_of_given_inputs(self) -> None:
        pooling = LowRankMultiHeadPooling(6, 4, "mean_input").double()
        hidden, inputs = torch.randn(2, 3, 5, 6, dtype=torch.float64)
        mask = MASKS["right"]
        inputs[mask] = torch.nan
        expected, _ = loop_reference(pooling, hidden, mask, inputs)
        torch.testing.assert_close(pooling(hidden, mask, inputs=inputs)[0], expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        pooling = LowRankMultiHeadPooling(6, 4).to(dtype)
        hidden = torch.randn(3, 5, 6, dtype=dtype)
        pooled, weights = pooling(hidden, MASKS["right"])
        assert pooled.dtype == weights.dtype == dtype
        expected, _ = loop_reference(pooling, hidden, MASKS["right"])
        tolerance = 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(pooled.double(), expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("per_sequence", [False, True])
    def test_scores_are_those_of_rank_one_matrices(self, per_sequence: bool) -> None:
        pooling = LowRankMultiHeadPooling(6, 4).double()
        hidden = torch.randn(3, 5, 6, dtype=torch.float64)
        context = torch.randn(3, 6, dtype=torch.float64) if per_sequence else pooling.context
        scores = pooling.scores(hidden, context)
        states = torch.tanh(hidden @ pooling.transform.weight.T + pooling.transform.bias)
        for head in range(4):
            matrix = torch.outer(pooling.P[:, head], pooling.Q[:, head])
            assert torch.linalg.matrix_rank(matrix) == 1
            for row in range(3):
                c = context[row] if per_sequence else context
                for t in range(5):
                    torch.testing.assert_close(scores[row, t, head], c @ matrix @ states[row, t], rtol=0, atol=1e-13)

    def test_single_token_gets_all_the_weight(self) -> None:
        hidden = torch.randn(2, 1, 6)
        pooled, weights = LowRankMultiHeadPooling(6, 3)(hidden)
        assert torch.equal(weights, torch.ones(2, 3, 1))
        torch.testing.assert_close(pooled, hidden.expand(2, 3, 6))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_zero_scores_give_equal_weights_and_finite_gradients(self, dtype: torch.dtype) -> None:
        pooling = LowRankMultiHeadPooling(6, 3).to(dtype)
        torch.nn.init.zeros_(pooling.context)
        hidden = torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
        pooled, weights = pooling(hidden)
        assert torch.equal(weights, torch.full((2, 3, 4), 0.25, dtype=dtype))
        torch.testing.assert_close(pooled, hidden.mean(1, keepdim=True).expand(2, 3, 6))
        pooled.float().sum().backward()
        assert hidden.grad.isfinite().all()

    def test_gradients(self) -> None:
        pooling = LowRankMultiHeadPooling(3, 2).double()
        hidden = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        mask = right_padding([4, 2], 4)
        names, values = zip(*pooling.named_parameters(), strict=True)

        def forward(hidden: Tensor, *values: Tensor) -> Tensor:
            parameters = dict(zip(names, values, strict=True))
            return torch.func.functional_call(pooling, parameters, (hidden, mask))[0]

        assert torch.autograd.gradcheck(forward, (hidden, *values))


class TestParameters:
    @pytest.mark.parametrize(("width", "heads"), [(6, 4), (100, 16), (7, 1)])
    def test_counts(self, width: int, heads: int) -> None:
        pooling = LowRankMultiHeadPooling(width, heads)
        assert pooling.P.numel() + pooling.Q.numel() == 2 * width * heads
        assert sum(p.numel() for p in pooling.parameters()) == 2 * width * heads + width + width**2 + width
        without = LowRankMultiHeadPooling(width, heads, context="mean_input")
        assert sum(p.numel() for p in without.parameters()) == 2 * width * heads + width**2 + width
        assert without.context is None

    def test_seed_decides_the_initial_values(self) -> None:
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            states.append(LowRankMultiHeadPooling(6, 4).state_dict())
        assert sorted(states[0]) == ["P", "Q", "context", "transform.bias", "transform.weight"]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def test_state_dict_moves_to_another(self) -> None:
        first, second = LowRankMultiHeadPooling(6, 4), LowRankMultiHeadPooling(6, 4)
        hidden = torch.randn(2, 3, 6)
        assert not torch.equal(first(hidden)[0], second(hidden)[0])
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(hidden)[0], second(hidden)[0])


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"embed_dim": 0, "num_heads": 2}, "embed_dim=0 must be an int of at least 1"),
            ({"embed_dim": 4, "num_heads": -1}, "num_heads=-1 must be an int of at least 1"),
            ({"embed_dim": 4, "num_heads": 2, "context": "mean"}, "context='mean' is unknown; use one of 'learned'"),
            ({"embed_dim": 4, "num_heads": 2, "eps": 0.0}, "eps=0.0 must be greater than 0"),
        ],
    )
    def test_arguments(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LowRankMultiHeadPooling(**arguments)

    def test_inputs_with_a_learned_context(self) -> None:
        with pytest.raises(ValueError, match="the context is learned"):
            LowRankMultiHeadPooling(4, 2)(torch.randn(1, 3, 4), inputs=torch.randn(1, 3, 4))

    def test_inputs_of_another_width(self) -> None:
        with pytest.raises(ValueError, match=r"inputs has shape \(1, 3, 5\).*\(1, 3, 4\)"):
            LowRankMultiHeadPooling(4, 2, "mean_input")(torch.randn(1, 3, 4), inputs=torch.randn(1, 3, 5))
