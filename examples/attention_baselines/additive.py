"""Additive attention pooling with one head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wara_peft.attention.checks import check_positive
from wara_peft.attention.pooling import weighted_sum, without_padding


class AdditivePooling(nn.Module):
    """Pools a sequence by one additive attention head.

        u_t = tanh(W h_t + b),   a = softmax over t of cᵀu_t,   s = Σ_t a_t h_t

    Source: Yang et al., "Hierarchical Attention Networks for Document Classification", NAACL 2016, equations 5 to 7.

    Args:
        embed_dim: d, width of the states and of u_t.

    Attributes:
        num_heads: 1.
        transform: `nn.Linear(d, d)`, W and b.
        context: parameter (d,).

    Raises:
        ValueError: `embed_dim` below 1.
    """

    num_heads = 1

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim)
        self.embed_dim = embed_dim
        self.transform = nn.Linear(embed_dim, embed_dim)
        self.context = nn.Parameter(torch.empty(embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, the context of unit expected norm."""
        self.transform.reset_parameters()
        nn.init.normal_(self.context, std=1 / math.sqrt(self.embed_dim))

    def forward(
        self, hidden: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Pool states (B, T, d) to (B, 1, d), with weights (B, 1, T) or None; masks and errors as in
        `LowRankMultiHeadPooling.forward`."""
        hidden, padding = without_padding(hidden, key_padding_mask, self.embed_dim)
        scores = torch.tanh(self.transform(hidden)) @ self.context[:, None]  # (B, T, 1)
        return weighted_sum(hidden, scores, padding, need_weights)
