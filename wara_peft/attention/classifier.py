"""Text classifiers that differ only in their attention pooling, so that poolings can be compared."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from .checks import check_positive, padding_positions
from .lama import Context, LowRankMultiHeadPooling


class Pooling(Protocol):
    """The interface of a pooling that the classifiers use. `LowRankMultiHeadPooling` has it.

    A pooling is an `nn.Module` that turns a sequence of states (B, T, d) into k vectors (B, k, d) for each text.

    Attributes:
        embed_dim: d, the width of the states.
        num_heads: k, the number of vectors for each text.
    """

    embed_dim: int
    num_heads: int

    def __call__(
        self, hidden: Tensor, key_padding_mask: Tensor | None, need_weights: bool, **pooling_inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]: ...


class PoolingHead(nn.Module):
    """A pooling, then an MLP on the k pooled vectors: logits = W_2 relu(W_1 [s_1 … s_k] + b_1) + b_2, with dropout.

    Args:
        pooling: the module that maps states (B, T, d) to (B, k, d).
        num_classes: number of logits.
        mlp_size: width of the hidden layer.
        dropout: probability of the dropout before each of the two linear layers.

    Raises:
        ValueError: a size is below 1.
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
        """Classify states (B, T, d). The pooling checks the mask, and raises its errors.

        Args:
            pooling_inputs: further tensors that this kind of pooling takes.

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
        pooling: the pooling; its width d is even, and the GRU has d/2 units in each direction.
        embed_dim: width of the embedding.
        mlp_size: width of the `PoolingHead`'s hidden layer.
        dropout: probability of the dropout in the `PoolingHead`, and of that of the embeddings.
        padding_idx: token whose embedding stays zero.

    Raises:
        ValueError: a size is below 1, or the pooling's width is odd.
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
            key_padding_mask: (B, T), True = padding. Padding must stand at the end, because the GRU's backward
                direction starts at the last token of each text.
            need_weights: whether to return the pooling's weights.

        Returns:
            Logits (B, num_classes), and the weights (B, k, T) or None.

        Raises:
            ValueError: padding stands before a token, or the pooling refuses the mask.
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
        # Packed, each text ends at its last token for the GRU. PyTorch wants the lengths on the CPU.
        packed = nn.utils.rnn.pack_padded_sequence(
            embedded, (~padding).sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        return nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=padding.shape[1])[
            0
        ]

    def _pooling_inputs(self, embedded: Tensor) -> dict[str, Tensor]:
        """The tensors that the pooling takes besides the states, by the names of its arguments."""
        return {}


class LAMAClassifier(RecurrentClassifier):
    """Embedding → bidirectional GRU → `LowRankMultiHeadPooling` → MLP, with the paper's sizes as defaults.

    The paper trains it with only cross entropy as loss; `orthogonality_penalty` of the weights can be added.
    Source: Mehta et al., "Low Rank Factorization for Compact Multi-Head Self-Attention", arXiv 1912.00835.

    Args:
        vocab_size: number of tokens.
        num_classes: number of logits.
        embed_dim: width of the embedding.
        hidden_size: number of the GRU's units in each direction; the states' width d is twice this number.
        num_heads: k, the number of the pooling's heads.
        mlp_size: width of the MLP's hidden layer.
        dropout: probability of the dropout of embeddings, and of that before each linear layer of the MLP.
        context: see `LowRankMultiHeadPooling`; "mean_input" uses the mean of the embedded tokens.
        padding_idx: token whose embedding stays zero.

    Raises:
        ValueError: a size is below 1, or with "mean_input" the embedding is not as wide as the states.
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
