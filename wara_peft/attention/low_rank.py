"""Multi-head attention whose four projections are products of two small factors (Low-Rank Transformer)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..factorized.low_rank_linear import LowRankLinear, Solver, factorize_linear, resolve_rank
from ..factorized.saved import OPENED
from .projected import Heads, ProjectedAttention


class LowRankMultiheadAttention(ProjectedAttention):
    """`nn.MultiheadAttention(batch_first=True)` with projections W ≈ U V of rank r: 8 d r weights in place of 4 d².

        head_i = softmax((U_q V_q x)_i (U_k V_k y)_iᵀ / √(d/h)) (U_v V_v z)_i,   output = U_o V_o [head_1 … head_h] + b

    This module can replace PyTorch's attention, also inside `nn.TransformerEncoderLayer`. Biases start at zero. The
    products U V start with the variance that `nn.MultiheadAttention` gives its weights.
    Source: Cahyawijaya et al., "Greenformers", arXiv 2108.10808 (Low-Rank Transformer: Winata et al., ICASSP 2020).

    Args:
        embed_dim: d.
        num_heads: h, a divisor of d.
        rank: r, at most d; a float is a fraction of the break-even d/2.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have biases.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: `LowRankLinear`.

    Raises:
        ValueError: a size, the rank or the dropout is out of its range.
    """

    q_proj: LowRankLinear
    k_proj: LowRankLinear
    v_proj: LowRankLinear
    out_proj: LowRankLinear

    def __init__(
        self, embed_dim: int, num_heads: int, rank: int | float, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        self.rank = resolve_rank(rank, embed_dim, embed_dim)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            LowRankLinear(embed_dim, embed_dim, self.rank, bias) for _ in range(4)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            # PyTorch draws one stacked weight (3d, d) for the three, by Xavier's rule: its variance is 2 / (3d + d).
            projection.reset_parameters(weight_variance=1 / (2 * self.embed_dim))
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.up.bias is not None:
                nn.init.zeros_(projection.up.bias)

    @classmethod
    def from_multihead(
        cls, module: nn.MultiheadAttention, rank: int | float, solver: Solver = "svd"
    ) -> LowRankMultiheadAttention:
        """Factorise the four projections of PyTorch's attention, each by `factorize_linear`.

        Raises:
            ValueError: `factorize_linear` refuses a projection, or the module is not batch first, has keys or values
                of another width than queries, or appends biases or zeros to keys and values.
        """
        if not module.batch_first:
            raise ValueError("the attention has batch_first=False; make it with batch_first=True.")
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise ValueError("the attention has kdim, vdim, add_bias_kv or add_zero_attn, which are not supported.")
        with torch.device("meta"):  # all four projections are replaced below, so none needs memory here
            attention = cls(module.embed_dim, module.num_heads, rank, module.dropout, module.in_proj_bias is not None)
        names = ("q_proj", "k_proj", "v_proj")
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        for name, weight, bias in zip(names, module.in_proj_weight.chunk(3), biases, strict=True):
            linear = nn.Linear(module.embed_dim, module.embed_dim, bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.detach(), requires_grad=module.in_proj_weight.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach(), requires_grad=module.in_proj_bias.requires_grad)
            setattr(attention, name, factorize_linear(linear, rank, solver))
        attention.out_proj = factorize_linear(module.out_proj, rank, solver)
        return attention.train(module.training)

    def _keys_and_mask(
        self, heads: Heads, padding: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, count, length, _ = heads.queries.shape
        size = heads.keys.shape[2]
        mask = None
        if attn_mask is not None:
            mask = self._checked_mask(attn_mask, batch * count, length, size)
            # In the caller's boolean mask True forbids attention, as in `nn.MultiheadAttention`; here True allows it.
            mask = ~mask if mask.dtype == torch.bool else mask.to(heads.queries.dtype)
            mask = mask.view(batch, count, length, size) if mask.dim() == 3 else mask
        elif is_causal:
            mask = torch.ones(length, size, dtype=torch.bool, device=heads.queries.device).tril()
        if padding is not None:
            tokens = ~padding[:, None, None, :]
            if mask is None:
                mask = tokens
            else:
                mask = mask & tokens if mask.dtype == torch.bool else mask.masked_fill(~tokens, -torch.inf)
        return heads.keys, heads.values, mask

    @staticmethod
    def _checked_mask(attn_mask: Tensor, batch_heads: int, length: int, size: int) -> Tensor:
        """Return the mask, or raise an error if its shape or dtype is wrong."""
        if attn_mask.shape not in ((length, size), (batch_heads, length, size)):
            raise ValueError(
                f"attn_mask has shape {tuple(attn_mask.shape)}; it must be (L, T) = {(length, size)} or "
                f"(batch * heads, L, T) = {(batch_heads, length, size)}."
            )
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise ValueError(
                f"attn_mask has dtype {attn_mask.dtype}; pass booleans, True where attention is not allowed, or "
                "floats to add to the scores."
            )
        return attn_mask

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def _with_dense_projections(module: nn.MultiheadAttention, rank: int) -> LowRankMultiheadAttention:
    """Make an attention for factors of a checkpoint: its projections are dense and without values, to be replaced."""
    bias = module.in_proj_bias is not None
    with torch.device("meta"):
        attention: Any = LowRankMultiheadAttention(module.embed_dim, module.num_heads, rank, module.dropout, bias)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(attention, name, nn.Linear(module.embed_dim, module.embed_dim, bias))
    return cast(LowRankMultiheadAttention, attention.train(module.training))


OPENED[nn.MultiheadAttention] = _with_dense_projections
