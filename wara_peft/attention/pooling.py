"""Parts of attention poolings: zeros at padding, the weighted sum of states, and a penalty on attention weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import padding_positions


def without_padding(hidden: Tensor, key_padding_mask: Tensor | None, embed_dim: int) -> tuple[Tensor, Tensor | None]:
    """Return the states with zeros at padding, and the padding as booleans (B, T) or None.

    An attention weight of zero is not enough. Padding may hold NaN or infinity, and zero times these is NaN, in the
    result and in the gradient.

    Raises:
        ValueError: `hidden` is not of shape (B, T, embed_dim), or `padding_positions` refuses the mask.
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
    """Return A H, where A is the softmax of the scores over time, with exact zeros at padding.

    Args:
        hidden: H, states (B, T, d) with zeros at padding, as `without_padding` returns them.
        scores: (B, T, k), one score for each position and head.
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
    """A penalty on heads that attend to the same positions: the mean over the batch of ‖A Aᵀ − I‖²_F.

    No module adds it to a loss; a training loop has to:
    `loss = cross_entropy(logits, labels) + coefficient * orthogonality_penalty(weights)`.
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
