"""A ViT's attention replaced by modules of `wara_peft.attention` with its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quality.training import Problem
from wara_peft.attention import LinformerAttention, LowRankMultiheadAttention


class SelfAttention(nn.Module):
    """An attention called as transformers' ViT calls its own."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, attention_mask: None = None, **kwargs: Any) -> tuple[Tensor, None]:
        """(B, T, d) to (B, T, d)"""
        return self.attention(hidden_states, hidden_states, hidden_states, need_weights=False)


@torch.no_grad()
def as_multihead(attention: nn.Module) -> nn.MultiheadAttention:
    """PyTorch's attention with the weights of the ViT's."""
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    width = attention.q_proj.in_features
    result = nn.MultiheadAttention(width, attention.num_attention_heads, batch_first=True)
    result.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
    result.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
    result.out_proj.load_state_dict(attention.o_proj.state_dict())
    return result


def with_low_rank_attention(problem: Problem, model: nn.Module, rank: int) -> nn.Module:
    """Factorised projections, from their SVD, all of which train."""
    _freeze(problem, model)
    for layer in model.vit.layers:
        layer.attention = SelfAttention(LowRankMultiheadAttention.from_multihead(as_multihead(layer.attention), rank))
    return model


def with_linformer(problem: Problem, model: nn.Module, mixtures: int) -> nn.Module:
    """Keys and values mixed along the length; the mixing trains, the projections stay the ViT's."""
    _freeze(problem, model)
    length = model.vit.embeddings.position_embeddings.shape[1]
    for layer in model.vit.layers:
        old = layer.attention
        new = LinformerAttention(old.q_proj.in_features, old.num_attention_heads, length, mixtures, sharing="headwise")
        for name, projection in (("q", old.q_proj), ("k", old.k_proj), ("v", old.v_proj), ("out", old.o_proj)):
            new_projection = new.get_submodule(f"{name}_proj")
            new_projection.load_state_dict(projection.state_dict())
            new_projection.requires_grad_(False)
        layer.attention = SelfAttention(new)
    return model


def _freeze(problem: Problem, model: nn.Module) -> None:
    model.requires_grad_(False)
    for name in problem.head:
        model.get_submodule(name).requires_grad_(True)
