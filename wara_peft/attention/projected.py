"""Multi-head attention with the interface of `nn.MultiheadAttention`, around four projections of any kind."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_positive, padding_positions


class Heads(NamedTuple):
    """Queries (B, h, L, d/h), and keys and values (B, h, T, d/h)."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class ProjectedAttention(nn.Module):
    """Base class of multi-head attentions: it checks shapes, splits states into heads, and computes the weighted sum.

    A subclass makes `q_proj`, `k_proj`, `v_proj` and `out_proj`. Its `_keys_and_mask` returns the keys and values that
    queries attend to, and the mask.

    Args:
        embed_dim: d, width of queries, keys and values, a multiple of `num_heads`.
        num_heads: h.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: a size is below 1, `embed_dim` is not a multiple of `num_heads`, or `dropout` is not in [0, 1).
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    batch_first = True
    # `nn.TransformerEncoderLayer` has a fused kernel that reads the weights of `nn.MultiheadAttention`, and would not
    # call this module. With these values of two of that class's attributes it does not use the kernel.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be at least 0 and less than 1.")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the arguments of `nn.MultiheadAttention.forward`.

        Args:
            query: (B, L, d), or (L, d) without a batch.
            key, value: (B, T, d), or (T, d).
            key_padding_mask: (B, T) or (T,), True = padding (or floats, -inf = padding, else 0).
            need_weights: whether to return the weights; if not, the faster `scaled_dot_product_attention` is used.
            attn_mask: (L, T) or (B·h, L, T), booleans with True = may not attend, or floats to be added to the scores.
            average_attn_weights: whether returned weights are averaged over heads.
            is_causal: whether position i attends only to positions up to i. With an `attn_mask` this is only a hint,
                and the mask decides.

        Returns:
            The output, which has the query's shape, and the weights or None. The weights are (B, L, S) if averaged,
            else (B, h, L, S); S is the number of keys that `_keys_and_mask` returned. B is missing from both if the
            query has no batch.

        Raises:
            ValueError: shapes or dtypes do not fit, or a sequence is all padding.
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        self._check_shapes(query, key, value)
        padding = padding_positions(key_padding_mask, key.shape[0], key.shape[1])

        heads = Heads(
            *(
                projection(states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
                for projection, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
            )
        )
        keys, values, mask = self._keys_and_mask(heads, padding, attn_mask, is_causal)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            # `scaled_dot_product_attention` does not return its weights, so they are computed here step by step.
            scores = heads.queries @ keys.transpose(-2, -1) / self.head_dim**0.5  # (B, h, L, S)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            weights = F.dropout(scores.softmax(-1), dropout)
            attended = weights @ values
        else:
            attended = F.scaled_dot_product_attention(heads.queries, keys, values, attn_mask=mask, dropout_p=dropout)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(-2))  # (B, L, d)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            output, weights = output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def _keys_and_mask(
        self, heads: Heads, padding: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys and values (B, h, S, d/h) to attend to, and a mask that broadcasts to (B, h, L, S), or None.

        In a boolean mask True means "attend", as in `scaled_dot_product_attention`, and not as in
        `nn.MultiheadAttention`, where it forbids. A mask of floats is added to the scores.
        """
        raise NotImplementedError

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        shapes = [tuple(states.shape) for states in (query, key, value)]
        fits = all(len(shape) == 3 and shape[0] == shapes[0][0] and shape[2] == self.embed_dim for shape in shapes)
        if not fits or shapes[1] != shapes[2]:
            raise ValueError(
                f"query, key and value have shapes {', '.join(map(str, shapes))}; they must be (batch, length, "
                f"embed_dim) with one batch size, embed_dim={self.embed_dim} and key as long as value."
            )

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"
