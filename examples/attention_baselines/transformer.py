"""One Transformer encoder layer, mean pooled."""

from __future__ import annotations

from torch import Tensor, nn

from wara_peft.attention.pooling import without_padding


class TransformerPooling(nn.Module):
    """Pools a sequence by the mean of one Transformer encoder layer's output.

        S = 1/T' Σ_t LayerNorm(x + FFN(x))_t,   x = LayerNorm(H + attention(H, H, H)),   T' tokens without padding

    The layer is PyTorch's `nn.TransformerEncoderLayer`, with this attention in the place of its own.

    Args:
        attention: what is called as `nn.MultiheadAttention(batch_first=True)` is, and has its `embed_dim`, `num_heads`
            and `batch_first`: that itself, `LowRankMultiheadAttention` or `LinformerAttention`.
        dim_feedforward: width of the layer's FFN; None means 4 d.
        dropout: the layer's.

    Attributes:
        num_heads: 1, the number of pooled vectors.
        layer: the encoder layer; `layer.self_attn` is the attention.

    Raises:
        ValueError: the attention is not batch first.
    """

    num_heads = 1

    def __init__(
        self,
        attention: nn.Module,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not attention.batch_first:
            raise ValueError("attention has batch_first=False; make it with batch_first=True.")
        self.embed_dim = attention.embed_dim
        self.layer = nn.TransformerEncoderLayer(
            attention.embed_dim,
            attention.num_heads,
            dim_feedforward or 4 * attention.embed_dim,
            dropout,
            batch_first=True,
        )
        self.layer.self_attn = attention

    def forward(
        self, hidden: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Pool states (B, T, d) to (B, 1, d); masks and errors as in `LowRankMultiHeadPooling.forward`.

        The weights (B, 1, T) are those of the mean over the layer's output: 1/T' at each token that is no padding.
        """
        hidden, padding = without_padding(hidden, key_padding_mask, self.embed_dim)
        output = self.layer(hidden, src_key_padding_mask=padding)  # (B, T, d)
        tokens = hidden.new_ones(hidden.shape[:2]) if padding is None else (~padding).to(hidden.dtype)
        weights = (tokens / tokens.sum(1, keepdim=True)).unsqueeze(1)  # (B, 1, T)
        return weights @ output, weights if need_weights else None
