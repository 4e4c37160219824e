"""Attention whose cost grows linearly with the length of the sequence (Linformer)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .checks import check_positive
from .projected import Heads, ProjectedAttention

Sharing = Literal["none", "headwise", "key-value", "layerwise"]


class LinformerAttention(ProjectedAttention):
    """Multi-head attention to k mixtures of positions: keys and values are projected along the length.

        head_i = softmax(Q_i (E_iᵀ K_i)ᵀ / √(d/h)) (F_iᵀ V_i),   E_i, F_i ∈ R^{n×k}

    Time and memory grow with L·k; those of full attention grow with L². Inputs shorter than n use the first rows of E
    and F. Keys and values at padding are set to zero. The attention weights have the shape (B, L, k): they belong to
    mixtures, not to positions. A mixture holds later positions too, so there is no causal form.
    Source: Wang et al., "Linformer", arXiv 2006.04768.

    Args:
        embed_dim: d.
        num_heads: h, a divisor of d.
        max_length: n, the largest number of keys.
        k: number of mixtures, at most n.
        sharing: how many matrices E and F there are. "none": each head has its own E and F, 2 h n k parameters.
            "headwise": all heads share one E and one F, 2 n k. "key-value": E also serves as F, n k. "layerwise": all
            layers share this E too; give the first layer's `E` to the others as `projection`.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have biases.
        projection: with "layerwise", the `E` of an earlier layer, to be shared; None makes a new one.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: `nn.Linear(d, d)`.
        E, F: parameters of shape (h, n, k) for "none", else (n, k); F is None if E serves as F.

    Raises:
        ValueError: a size is out of its range, `sharing` is unknown, or `projection` has another shape or is given
            without "layerwise".
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    F: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_length: int,
        k: int = 256,
        sharing: Sharing = "none",
        dropout: float = 0.0,
        bias: bool = True,
        *,
        projection: nn.Parameter | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        check_positive(max_length=max_length, k=k)
        if k > max_length:
            raise ValueError(f"k={k} is more than max_length={max_length}; choose a smaller k, or use full attention.")
        if sharing not in get_args(Sharing):
            raise ValueError(f"sharing={sharing!r} is unknown; use one of {', '.join(map(repr, get_args(Sharing)))}.")
        shape = (num_heads, max_length, k) if sharing == "none" else (max_length, k)
        if projection is not None and (sharing != "layerwise" or projection.shape != shape):
            raise ValueError(
                f"projection of shape {tuple(projection.shape)} with sharing={sharing!r}: it takes "
                f"sharing='layerwise' and the shape (max_length, k) = {(max_length, k)}."
            )
        self.max_length = max_length
        self.k = k
        self.sharing = sharing
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim, bias) for _ in range(4)
        )
        self.E = nn.Parameter(torch.empty(shape)) if projection is None else projection
        own_values = sharing in ("none", "headwise")
        self.register_parameter("F", nn.Parameter(torch.empty(shape)) if own_values else None)
        self._reset_projections()
        # A shared E keeps the values that it has.
        for length_projection in (None if projection is not None else self.E, self.F):
            if length_projection is not None:
                # With this variance E Eᵀ is the identity in expectation, which the paper's theorem needs.
                nn.init.normal_(length_projection, std=1 / math.sqrt(k))

    def _reset_projections(self) -> None:
        """Draw weights as `nn.MultiheadAttention` does, and set biases to zero.

        PyTorch has one weight (3d, d) for queries, keys and values, and draws it by Xavier's rule. So the bound here
        is that of the stacked weight, √(6 / (3d + d)), not that of a (d, d) weight.
        """
        bound = math.sqrt(6 / (4 * self.embed_dim))
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.uniform_(projection.weight, -bound, bound)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def _keys_and_mask(
        self, heads: Heads, padding: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if attn_mask is not None or is_causal:
            raise ValueError(
                "LinformerAttention takes no attn_mask and cannot be causal: its keys are mixtures of all positions. "
                "Use LowRankMultiheadAttention or nn.MultiheadAttention for that."
            )
        keys, values = heads.keys, heads.values
        length = keys.shape[2]
        if length > self.max_length:
            raise ValueError(
                f"The keys have length {length}, more than max_length={self.max_length}. Truncate them, or make the "
                "attention with a larger max_length."
            )
        if padding is not None:
            keys, values = (states.masked_fill(padding[:, None, :, None], 0.0) for states in (keys, values))
        of_keys, of_values = self.E, self.E if self.F is None else self.F
        keys = of_keys[..., :length, :].transpose(-2, -1) @ keys  # (B, h, k, d/h)
        values = of_values[..., :length, :].transpose(-2, -1) @ values
        return keys, values, None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_length={self.max_length}, k={self.k}, sharing={self.sharing!r}"
