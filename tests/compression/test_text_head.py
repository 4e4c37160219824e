"""The head beside CLIP's own logits, the SVD, and what may and may not get a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from wara_peft.compression import LowRankTextHead

TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 12, "projection_dim": 10, "projection_size": 10, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4, "projection_dim": 10}  # fmt: skip


def clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)).eval()


def siglip() -> SiglipModel:
    vision = {**VISION, "hidden_size": 10, "num_attention_heads": 2}
    model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=vision)).eval()
    nn.init.constant_(model.logit_bias, -3.0)
    return model


@pytest.mark.parametrize("make", [clip, siglip])
@torch.no_grad()
def test_full_rank_is_the_models_own_logits(make) -> None:
    model = make()
    ids, pixels = torch.randint(3, 40, (6, 12)), torch.randn(3, 3, 8, 8)
    expected = model(input_ids=ids, pixel_values=pixels)
    head = LowRankTextHead.from_clip(model, 6, input_ids=ids)
    torch.testing.assert_close(head(expected.image_embeds), expected.logits_per_image, rtol=0, atol=1e-5)


def features(count: int = 9, width: int = 7) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_error_is_the_tail_of_the_spectrum(rank: int) -> None:
    text = features()
    head = LowRankTextHead(text, rank)
    rows = functional.normalize(text, dim=-1)
    tail = torch.linalg.svdvals(rows)[rank:].square().sum()
    torch.testing.assert_close(head.reconstruction_loss(3 * text).detach(), tail, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(head.basis @ head.basis.T, torch.eye(rank, dtype=torch.float64))
    assert sum(value.numel() for value in head.parameters()) == rank * (9 + 7)


def test_gradients_of_the_task_and_of_reconstruction_are_apart() -> None:
    text, image = features(), features(4)
    head = LowRankTextHead(text, 3, scale=5.0)
    head.basis.requires_grad_()
    functional.cross_entropy(head(image), torch.tensor([0, 1, 2, 8])).backward()
    assert head.basis.grad is None and bool(head.weights.grad.any())
    head.weights.grad = None
    head.reconstruction_loss(text).backward()
    assert head.weights.grad is None and head.basis.grad is not None
    rows = functional.normalize(text, dim=-1)
    weights = head.weights.detach()
    torch.testing.assert_close(head.basis.grad, 2 * weights.T @ (weights @ head.basis.detach() - rows))


def test_training_the_weights_learns_and_leaves_the_basis() -> None:
    torch.manual_seed(0)
    head, image = LowRankTextHead(features(), 3, scale=10.0), features(6)
    labels, before = torch.tensor([0, 1, 2, 3, 4, 5]), head.basis.clone()
    optimizer = torch.optim.AdamW([value for value in head.parameters() if value.requires_grad], lr=0.05)
    losses = []
    for _ in range(50):
        loss = functional.cross_entropy(head(image), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2 and torch.equal(head.basis, before)


@torch.no_grad()
def test_new_classes_by_projection_leave_others() -> None:
    text, new, image = features(), features(2), features(4)
    head = LowRankTextHead(text, 4)
    before, logits = head.weights.clone(), head(image)
    head.add_classes(new)
    assert torch.equal(head.weights[:9], before) and head(image).shape == (4, 11)
    torch.testing.assert_close(head(image)[:, :9], logits, rtol=1e-14, atol=1e-14)
    rows = functional.normalize(new, dim=-1)
    torch.testing.assert_close(head.weights[9:] @ head.basis, rows @ head.basis.T @ head.basis)
    # A class in the span of the basis is itself.
    head.add_classes(head.basis[:1])
    torch.testing.assert_close(head.text_features[-1], head.basis[0])


def test_rows_of_zeros_bfloat16_and_state() -> None:
    head = LowRankTextHead(features().bfloat16(), 3, scale=torch.tensor(7.0))
    with torch.no_grad():
        head.weights[2] = 0
    logits = head(features(4).bfloat16())
    assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all()) and not bool(logits[:, 2].any())
    other = LowRankTextHead(features().bfloat16(), 3)
    other.load_state_dict(head.state_dict())
    assert float(other.scale) == 7


def broken_head() -> LowRankTextHead:
    head = LowRankTextHead(features(), 2)
    head.basis.data[0, 0] = torch.nan
    return head


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: LowRankTextHead(features(), 8),
            ValueError,
            "rank=8 of 9 classes with 7 features must be",
        ),
        (lambda: LowRankTextHead(features()[0], 1), ValueError, "must be a matrix of finite floats"),
        (lambda: LowRankTextHead(features() * torch.nan, 1), ValueError, "finite floats"),
        (lambda: LowRankTextHead(features(), 2).add_classes(features(2, 6)), ValueError, "have 6 features"),
        (lambda: broken_head().add_classes(features(2)), ValueError, "basis holds NaN or infinity"),
        (lambda: LowRankTextHead(features(), 2).reconstruction_loss(features(8)), ValueError, r"shape \(8, 7\)"),
        (lambda: LowRankTextHead.from_clip(nn.Linear(2, 2), 1), TypeError, "Linear has no get_text_features"),
    ],
)
def test_is_refused(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
