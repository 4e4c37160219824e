"""What the attention poolings share: states without padding, the weighted sum, and a penalty on its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import padding_positions


def without_padding(hidden: Tensor, key_padding_mask: Tensor | None, embed_dim: int) -> tuple[Tensor, Tensor | None]:
    """Return the states with zeros at padding, and the padding as booleans (B, T) or None.

    A weight of zero alone would not do: zero times a NaN or an infinity, which padding may hold, is NaN, in the
    forward and in the gradient.

    Raises:
        ValueError: `hidden` is not (B, T, embed_dim), or as `padding_positions`.
    """
    if hidden.dim() != 3 or hidden.shape[-1] != embed_dim:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; it must be (batch, length, embed_dim), embed_dim={embed_dim}."
        )
    padding = padding_positions(key_padding_mask, hidden.shape[0], hidden.shape[1])
    return (hidden if padding is None else hidden.masked_fill(padding[..., None], 0.0)), padding


def weighted_sum(
    hidden: Tensor, scores: Tensor, padding: Tensor | None, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Return A H with A = softmax over time of the scores, exactly zero at padding.

    Args:
        hidden: (B, T, d), without padding.
        scores: (B, T, k).
        padding: booleans (B, T) or None.
        need_weights: whether to return A too.

    Returns:
        The pooled states (B, k, d), and A of shape (B, k, T) or None.
    """
    scores = scores.transpose(1, 2)  # (B, k, T)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, :], -torch.inf)
    weights = scores.softmax(-1)
    return weights @ hidden, weights if need_weights else None


def orthogonality_penalty(weights: Tensor) -> Tensor:
    """Penalty on heads that look at the same places: the mean over the batch of ‖A Aᵀ − I‖²_F.

    Nothing adds it unasked: `loss = cross_entropy(logits, labels) + coefficient * orthogonality_penalty(weights)`.
    Source: Lin et al., "A Structured Self-attentive Sentence Embedding", arXiv 1703.03130, equation 8.

    Args:
        weights: A, attention weights (B, k, T) of k heads.

    Returns:
        A scalar in the dtype of the weights.

    Raises:
        ValueError: `weights` does not have three dimensions.
    """
    if weights.dim() != 3:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; it must be (batch, heads, length).")
    identity = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
    return (weights @ weights.transpose(1, 2) - identity).square().sum((1, 2)).mean()
