"""Structured self-attention pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wara_peft.attention.checks import check_positive
from wara_peft.attention.pooling import weighted_sum, without_padding


class StructuredSelfAttentionPooling(nn.Module):
    """Pools a sequence by k attention heads that share one hidden layer.

        A = softmax over t of W_2 tanh(W_1 Hᵀ),   S = A H,   W_1 ∈ R^{a×d}, W_2 ∈ R^{k×a}

    Its authors train it with `orthogonality_penalty` of the weights, coefficient 1.
    Source: Lin et al., "A Structured Self-attentive Sentence Embedding", arXiv 1703.03130.

    Args:
        embed_dim: d, width of the states.
        num_heads: k, the paper's r.
        attention_dim: a, width of the hidden layer.

    Attributes:
        hidden_layer, head_layer: W_1 and W_2, `nn.Linear` without bias.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, embed_dim: int, num_heads: int = 30, attention_dim: int = 350) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim, num_heads=num_heads, attention_dim=attention_dim)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.hidden_layer = nn.Linear(embed_dim, attention_dim, bias=False)
        self.head_layer = nn.Linear(attention_dim, num_heads, bias=False)

    def forward(
        self, hidden: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Pool states (B, T, d) to (B, k, d), with weights (B, k, T) or None; masks and errors as in
        `LowRankMultiHeadPooling.forward`."""
        hidden, padding = without_padding(hidden, key_padding_mask, self.embed_dim)
        scores = self.head_layer(torch.tanh(self.hidden_layer(hidden)))  # (B, T, k)
        return weighted_sum(hidden, scores, padding, need_weights)
