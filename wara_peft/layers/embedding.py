"""WaRA beside an embedding: the wavelet transform runs along the vocabulary, but only for the tokens of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..base_layers.kinds import EMBEDDING
from .base import WaRALayer, add_low_rank


class Embedding(WaRALayer, kinds=[EMBEDDING]):
    """result = base(tokens) + scaling · (Â_tokens)ᵀ B̂ᵀ, with Â of shape (R, vocabulary) and B̂ of shape (hidden, R).

    Each token's column of Â is computed from the few coefficients that it needs; the whole vocabulary axis is never
    synthesised. As in LoRA, A starts at zero and B is drawn from N(0, 1), dropout does not apply, and layers that
    scale their embeddings scale the adapter's part too. With `scale_grad_by_freq` the gradient of a token's column of
    Â is divided by how often the token occurs. Unlike in LoRA, the row of a padding token does not stay zero: it
    shares coefficients with its neighbours on the vocabulary axis.
    """

    def reset_wara_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw B_s from N(0, 1), and set A_s to zero; if `init_weights` is False, draw A_s as well."""
        factor_a, factor_b = self.factors(adapter_name)
        for rows in factor_a.parameters():
            if init_weights:
                nn.init.zeros_(rows)
            else:
                nn.init.normal_(rows)
        for columns in factor_b.parameters():
            nn.init.normal_(columns)

    def _add_product(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        factor_a, factor_b = self.factors(adapter)
        hidden = factor_a(x.flatten()).T  # (tokens, R)
        if self.get_base_layer().scale_grad_by_freq:
            hidden = _divide_gradient(hidden, _occurrences(x.flatten(), self.in_features).unsqueeze(1))
        columns = factor_b()  # B̂, (hidden size, R)
        embed_scale = self._get_embed_scale()  # type: ignore[no-untyped-call]
        if embed_scale is not None:
            columns = columns * embed_scale.to(columns.dtype)
        return add_low_rank(result, hidden, columns, self.scaling[adapter])


def _occurrences(tokens: Tensor, vocabulary: int) -> Tensor:
    """Count for each of the tokens, of shape (tokens,), how many times it occurs among them."""
    ones = torch.ones_like(tokens)
    return torch.zeros(vocabulary, dtype=tokens.dtype, device=tokens.device).index_add(0, tokens, ones)[tokens]


def _divide_gradient(values: Tensor, divisor: Tensor) -> Tensor:
    """Return the values as they are; in backward their gradient is divided by `divisor`."""
    return values.detach() + (values - values.detach()) / divisor
