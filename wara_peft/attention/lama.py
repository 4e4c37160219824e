"""Low-rank multi-head attention pooling (LAMA): attention weights from bilinear scores of rank one."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_positive
from .pooling import weighted_sum, without_padding

Context = Literal["learned", "mean_input"]


class LowRankMultiHeadPooling(nn.Module):
    """Pools a sequence by k attention heads whose bilinear scores have rank one each.

        u_t = tanh(W h_t + b)
        f_t = tanh(Pᵀc ∘ Qᵀu_t) ∈ R^k,   f̂_t = f_t / max(‖f_t‖₂, eps)
        A = softmax over t of f̂_t,   S = A H

    h_t is the state at position t, H all states, c a context vector. Before the tanh, head i scores position t by
    cᵀ(p_i q_iᵀ)u_t, where p_i and q_i are columns of P and Q. P and Q have 2dk parameters together; k heads with full
    bilinear forms have kd². f_t is normalised across heads, so a single head would keep only the sign of its score:
    use two or more.
    Source: Mehta et al., "Low Rank Factorization for Compact Multi-Head Self-Attention", arXiv 1912.00835.

    Args:
        embed_dim: d, width of the states.
        num_heads: k.
        context: "learned" makes c a parameter; "mean_input" makes c the mean of the input embeddings, so that each
            text has its own context.
        eps: the least norm by which f_t is divided. If the dtype's smallest normal number is larger, that is used.

    Attributes:
        P, Q: parameters (d, k).
        context: the parameter c of shape (d,), or None for "mean_input".
        transform: `nn.Linear(d, d)` with W and b.

    Raises:
        ValueError: a size is below 1, `context` is unknown, or `eps` is not positive.
    """

    context: nn.Parameter | None

    def __init__(self, embed_dim: int, num_heads: int, context: Context = "learned", eps: float = 1e-12) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim, num_heads=num_heads)
        if context not in get_args(Context):
            raise ValueError(f"context={context!r} is unknown; use one of {', '.join(map(repr, get_args(Context)))}.")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be greater than 0, or a position that all heads score zero gives NaN.")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.eps = eps
        self.transform = nn.Linear(embed_dim, embed_dim)
        self.P = nn.Parameter(torch.empty(embed_dim, num_heads))
        self.Q = nn.Parameter(torch.empty(embed_dim, num_heads))
        self.register_parameter("context", nn.Parameter(torch.empty(embed_dim)) if context == "learned" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again: P and Q by Xavier's rule, c with an expected squared norm of one."""
        self.transform.reset_parameters()
        nn.init.xavier_uniform_(self.P)
        nn.init.xavier_uniform_(self.Q)
        if self.context is not None:
            nn.init.normal_(self.context, std=1 / math.sqrt(self.embed_dim))

    def scores(self, hidden: Tensor, context: Tensor) -> Tensor:
        """The heads' bilinear scores cᵀ(p_i q_iᵀ)u_t; the tanh and the normalisation of f_t come later.

        Args:
            hidden: the states (B, T, d).
            context: c, of shape (d,), or of shape (B, d) if each sequence has its own context.

        Returns:
            Scores of shape (B, T, k).
        """
        # cᵀ(p_i q_iᵀ)u_t = (cᵀp_i)(q_iᵀu_t), so no d × d matrix of a head is ever made.
        projected = torch.tanh(self.transform(hidden)) @ self.Q  # (B, T, k)
        return (context @ self.P).unsqueeze(-2) * projected

    def forward(
        self,
        hidden: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        *,
        inputs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Pool the states of each sequence.

        Args:
            hidden: H, the encoder's states (B, T, d).
            key_padding_mask: (B, T), True = padding. Padding gets a weight of exactly zero and no gradient, whatever
                values (NaN too) `hidden` has there.
            need_weights: whether to return the attention weights.
            inputs: for "mean_input", the encoder's input embeddings (B, T, d). Their mean over the positions without
                padding is the context. None takes the mean of `hidden`.

        Returns:
            The pooled states S of shape (B, k, d), and the weights A of shape (B, k, T) or None.

        Raises:
            ValueError: a shape or the mask is wrong, a sequence is all padding, or `inputs` is given though the
                context is learned.
        """
        if inputs is not None and self.context is not None:
            raise ValueError("inputs is given, but the context is learned; leave it out or use context='mean_input'.")
        hidden, padding = without_padding(hidden, key_padding_mask, self.embed_dim)
        context: Tensor
        if self.context is not None:
            context = self.context
        else:
            context = self._mean(hidden if inputs is None else self._checked(inputs, hidden), padding)
        scores = torch.tanh(self.scores(hidden, context))
        # In float16 the default of eps would round to zero, and a position with scores of zero would give NaN.
        scores = F.normalize(scores, dim=-1, eps=max(self.eps, torch.finfo(scores.dtype).tiny))
        return weighted_sum(hidden, scores, padding, need_weights)

    def _checked(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        if inputs.shape != hidden.shape:
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)}; it must have that of hidden, {tuple(hidden.shape)}: choose "
                "an embedding as wide as the encoder's states, or project it."
            )
        return inputs

    @staticmethod
    def _mean(states: Tensor, padding: Tensor | None) -> Tensor:
        """The mean over the positions that are not padding, of shape (B, d)."""
        if padding is None:
            return states.mean(1)
        count = (~padding).sum(1, keepdim=True)  # (B, 1)
        return states.masked_fill(padding[..., None], 0.0).sum(1) / count

    def extra_repr(self) -> str:
        context = "mean_input" if self.context is None else "learned"
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, context={context!r}, eps={self.eps}"
