"""Text classifiers around an attention pooling: the frame in which poolings are compared."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from .checks import check_positive, padding_positions
from .lama import Context, LowRankMultiHeadPooling


class Pooling(Protocol):
    """What the classifiers need of a pooling, which is an `nn.Module`: `LowRankMultiHeadPooling`, or one called alike.

    Attributes:
        embed_dim: d, width of the states (B, T, d) that it pools.
        num_heads: k, number of the vectors (B, k, d) that it makes of them.
    """

    embed_dim: int
    num_heads: int

    def __call__(
        self, hidden: Tensor, key_padding_mask: Tensor | None, need_weights: bool, **pooling_inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]: ...


class PoolingHead(nn.Module):
    """A pooling and an MLP on its flattened result: logits = W_2 relu(W_1 [s_1 … s_k] + b_1) + b_2, with dropout.

    Args:
        pooling: maps states (B, T, d) to (B, k, d).
        num_classes: number of logits.
        mlp_size: width of the hidden layer.
        dropout: applied before each of the two linear layers.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, pooling: Pooling, num_classes: int, mlp_size: int = 512, dropout: float = 0.4) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, mlp_size=mlp_size)
        self.pooling = pooling
        self.mlp = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(pooling.num_heads * pooling.embed_dim, mlp_size),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_size, num_classes),
        )

    def forward(
        self,
        hidden: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        **pooling_inputs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Classify states (B, T, d); masks and errors are the pooling's.

        Args:
            pooling_inputs: what else the pooling takes.

        Returns:
            Logits (B, num_classes), and the pooling's weights (B, k, T) or None.
        """
        pooled, weights = self.pooling(hidden, key_padding_mask, need_weights, **pooling_inputs)
        return self.mlp(pooled.flatten(1)), weights


class RecurrentClassifier(nn.Module):
    """Embedding → bidirectional GRU → pooling → MLP.

    Args:
        vocab_size: number of tokens.
        num_classes: number of logits.
        pooling: of width d = 2 h for h units of the GRU in each direction.
        embed_dim: width of the embedding.
        mlp_size, dropout: of the `PoolingHead`; dropout is applied to the embeddings too.
        padding_idx: token whose embedding stays zero.

    Raises:
        ValueError: a size below 1, or a pooling of odd width.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        pooling: Pooling,
        embed_dim: int = 100,
        mlp_size: int = 512,
        dropout: float = 0.4,
        padding_idx: int = 0,
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, embed_dim=embed_dim)
        if pooling.embed_dim % 2:
            raise ValueError(
                f"The pooling has embed_dim={pooling.embed_dim}; it must be even, half for each direction of the GRU."
            )
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(embed_dim, pooling.embed_dim // 2, batch_first=True, bidirectional=True)
        self.head = PoolingHead(pooling, num_classes, mlp_size, dropout)

    def forward(
        self, tokens: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Classify texts.

        Args:
            tokens: integers (B, T).
            key_padding_mask: (B, T), True = padding, which must stand at the end: the backward direction starts at
                each text's own last token.
            need_weights: whether to return the pooling's weights.

        Returns:
            Logits (B, num_classes), and the weights (B, k, T) or None.

        Raises:
            ValueError: padding before a token, or as the pooling.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; it must be (batch, length).")
        padding = padding_positions(key_padding_mask, tokens.shape[0], tokens.shape[1])
        embedded = self.dropout(self.embedding(tokens))  # (B, T, e)
        hidden = self._encode(embedded, padding)  # (B, T, d)
        logits, weights = self.head(hidden, padding, need_weights, **self._pooling_inputs(embedded))
        return logits, weights

    def _encode(self, embedded: Tensor, padding: Tensor | None) -> Tensor:
        if padding is None:
            hidden: Tensor = self.gru(embedded)[0]
            return hidden
        if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
            raise ValueError("key_padding_mask has padding before a token; pad the texts on the right.")
        packed = nn.utils.rnn.pack_padded_sequence(
            embedded, (~padding).sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        return nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=padding.shape[1])[
            0
        ]

    def _pooling_inputs(self, embedded: Tensor) -> dict[str, Tensor]:
        """What the pooling takes beside the states."""
        return {}


class LAMAClassifier(RecurrentClassifier):
    """Embedding → bidirectional GRU → `LowRankMultiHeadPooling` → MLP, with the paper's sizes as defaults.

    The paper trains it with cross entropy alone; `orthogonality_penalty` of the weights can be added.
    Source: Mehta et al., "Low Rank Factorization for Compact Multi-Head Self-Attention", arXiv 1912.00835.

    Args:
        vocab_size: number of tokens.
        num_classes: number of logits.
        embed_dim: width of the embedding.
        hidden_size: units of the GRU in each direction, so that d is twice that.
        num_heads: k.
        mlp_size: width of the MLP's hidden layer.
        dropout: applied to embeddings and before each linear layer of the MLP.
        context: as in `LowRankMultiHeadPooling`; for "mean_input", the mean of the embedded tokens.
        padding_idx: token whose embedding stays zero.

    Raises:
        ValueError: a size below 1, or with "mean_input" an embedding that is not as wide as the states.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        embed_dim: int = 100,
        hidden_size: int = 50,
        num_heads: int = 16,
        mlp_size: int = 512,
        dropout: float = 0.4,
        context: Context = "learned",
        padding_idx: int = 0,
    ) -> None:
        if context == "mean_input" and embed_dim != 2 * hidden_size:
            raise ValueError(
                f"embed_dim={embed_dim} and hidden_size={hidden_size}: with context='mean_input' the mean embedding "
                f"is compared with the states, so embed_dim must be 2 * hidden_size = {2 * hidden_size}."
            )
        pooling = LowRankMultiHeadPooling(2 * hidden_size, num_heads, context)
        super().__init__(vocab_size, num_classes, pooling, embed_dim, mlp_size, dropout, padding_idx)
        self._context = context

    def _pooling_inputs(self, embedded: Tensor) -> dict[str, Tensor]:
        return {"inputs": embedded} if self._context == "mean_input" else {}
