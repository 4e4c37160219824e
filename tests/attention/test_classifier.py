"""The classifiers: sizes, padding that changes nothing, saving, learning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.examples.test_examples import example
from wara_peft.attention import (
    LAMAClassifier,
    LowRankMultiHeadPooling,
    PoolingHead,
    RecurrentClassifier,
)

AdditivePooling = example("attention_baselines").AdditivePooling
LENGTHS = (6, 3, 1)
PADDING = torch.arange(6)[None, :] >= torch.tensor(LENGTHS)[:, None]


def texts() -> Tensor:
    return torch.randint(1, 30, (3, 6)).masked_fill(PADDING, 0)


@pytest.mark.parametrize("context", ["learned", "mean_input"])
class TestLAMAClassifier:
    def test_padding_changes_nothing(self, context: str) -> None:
        model = LAMAClassifier(30, 4, context=context).double().eval()
        tokens = texts()
        logits, weights = model(tokens, PADDING, need_weights=True)
        assert logits.shape == (3, 4)
        assert (weights.transpose(1, 2)[PADDING] == 0).all()
        for row, length in enumerate(LENGTHS):
            alone, weights_alone = model(tokens[row : row + 1, :length], need_weights=True)
            torch.testing.assert_close(logits[row], alone[0])
            torch.testing.assert_close(weights[row, :, :length], weights_alone[0])

    def test_equal_to_its_parts(self, context: str) -> None:
        model = LAMAClassifier(30, 4, context=context).double().eval()
        tokens = texts()[:1]
        embedded = model.embedding.weight[tokens]
        states = model.gru(embedded)[0]
        inputs = {"inputs": embedded} if context == "mean_input" else {}
        pooled, _ = model.head.pooling(states, **inputs)
        _, first, _, _, last = model.head.mlp
        hidden = torch.relu(first.weight @ pooled.flatten() + first.bias)
        torch.testing.assert_close(model(tokens)[0][0], last.weight @ hidden + last.bias)


def test_the_papers_sizes() -> None:
    model = LAMAClassifier(30, 4)
    gru = 2 * 3 * (50 * 100 + 50 * 50 + 2 * 50)  # both directions, three gates, two biases
    pooling = 2 * 100 * 16 + 100 + 100 * 100 + 100
    mlp = 16 * 100 * 512 + 512 + 512 * 4 + 4
    assert sum(p.numel() for p in model.parameters()) == 30 * 100 + gru + pooling + mlp
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.4}


def test_it_learns() -> None:
    """Which of two tokens is in the text, wherever it stands?"""
    model = LAMAClassifier(12, 2, embed_dim=8, hidden_size=4, num_heads=2, mlp_size=16, dropout=0.1)
    labels = torch.arange(64) % 2
    tokens = torch.randint(3, 12, (64, 7))
    tokens[torch.arange(64), torch.randint(7, (64,))] = 1 + labels
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens)[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.eval()(tokens)[0].argmax(1) == labels).float().mean() > 0.9


def test_state_dict_moves_to_another() -> None:
    first, second = LAMAClassifier(30, 4).eval(), LAMAClassifier(30, 4).eval()
    tokens = texts()
    assert not torch.equal(first(tokens, PADDING)[0], second(tokens, PADDING)[0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(tokens, PADDING)[0], second(tokens, PADDING)[0])


def test_any_pooling_in_the_same_frame() -> None:
    lama = RecurrentClassifier(30, 4, LowRankMultiHeadPooling(10, 3))
    additive = RecurrentClassifier(30, 4, AdditivePooling(10))
    shapes = [
        {name: value.shape for name, value in model.state_dict().items() if not name.startswith("head.")}
        for model in (lama, additive)
    ]
    assert shapes[0] == shapes[1]
    assert lama.head.mlp[1].in_features == 3 * additive.head.mlp[1].in_features == 30
    assert additive(texts(), PADDING)[1] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LAMAClassifier(30, 4, embed_dim=60, context="mean_input"), "embed_dim=60 and hidden_size=50"),
        (lambda: LAMAClassifier(0, 4), "vocab_size=0 must be an int of at least 1"),
        (lambda: PoolingHead(AdditivePooling(4), 0), "num_classes=0 must be an int of at least 1"),
        (lambda: RecurrentClassifier(30, 4, AdditivePooling(5)), "embed_dim=5; it must be even"),
        (lambda: LAMAClassifier(30, 4)(torch.ones(3, dtype=torch.long)), r"tokens has shape \(3,\)"),
        (lambda: LAMAClassifier(30, 4)(texts(), PADDING.flip(1)), "pad the texts on the right"),
        (lambda: LAMAClassifier(30, 4)(texts(), torch.ones_like(PADDING)), r"rows \[0, 1, 2\]"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
