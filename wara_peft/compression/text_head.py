"""The text side of a CLIP-like classifier as weights of classes times a small basis."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import check_whole_number


class LowRankTextHead(nn.Module):
    """Classes as rows of W times a basis B of text features: logits = τ z normalize(W B)ᵀ + β, with z of length one.

    With F, (N, D), the text embeddings of N classes as rows of length one and F = P Σ Qᵀ, W = P_m Σ_m and B = Q_mᵀ, so
    that ‖F − W B‖²_F = Σ_{i>m} σ_i², and the rank of F gives what the whole text side does. The loss of a task trains
    W alone; B moves by `reconstruction_loss`, if it is unfrozen. m (N + D) numbers stand for N D.

    After Lei et al., "HOLa", arXiv 2507.15542: its basis is one of principal components without scale and mean, for a
    detector of interactions; this is the form whose start is CLIP's own zero-shot classifier.

    Args:
        text_features: F, (N, D); rows are made of length one.
        rank: m, at most min(N, D).
        scale: τ, the exponential of CLIP's `logit_scale`.
        bias: β, as SigLIP has.

    Attributes:
        weights: W, (N, m).
        basis: B, (m, D), frozen at first.

    Raises:
        ValueError: features that are no finite matrix, or a rank out of its range.
    """

    def __init__(
        self, text_features: Tensor, rank: int, scale: float | Tensor = 100.0, bias: float | Tensor = 0.0
    ) -> None:
        super().__init__()
        features = _checked(text_features)
        most = min(features.shape)
        of = f" of {features.shape[0]} classes with {features.shape[1]} features"
        check_whole_number("rank", rank, most=most, of=of)
        dtype = text_features.dtype
        left, values, right = torch.linalg.svd(features.double(), full_matrices=False)
        self.weights = nn.Parameter((left[:, :rank] * values[:rank]).to(dtype))
        self.basis = nn.Parameter(right[:rank].to(dtype), requires_grad=False)
        self.scale: Tensor
        self.register_buffer("scale", torch.as_tensor(scale, dtype=dtype, device=features.device).detach().clone())
        self.bias: Tensor
        self.register_buffer("bias", torch.as_tensor(bias, dtype=dtype, device=features.device).detach().clone())

    @classmethod
    @torch.no_grad()
    def from_clip(cls, model: nn.Module, rank: int, **text_inputs: Tensor) -> LowRankTextHead:
        """Of a CLIP-like model of transformers (CLIP, SigLIP, ALIGN, …) and the tokens of one text for each class.

        Args:
            model: has `get_text_features` and `logit_scale`, and maybe `logit_bias`.
            rank: m.
            text_inputs: `input_ids`, `attention_mask`, … of N texts.

        Raises:
            TypeError: the model has not these.
        """
        scale = getattr(model, "logit_scale", None)
        if not hasattr(model, "get_text_features") or not isinstance(scale, Tensor):
            raise TypeError(f"{type(model).__name__} has no get_text_features and logit_scale, as CLIP has.")
        bias = getattr(model, "logit_bias", None)
        output = cast(Any, model).get_text_features(**text_inputs)
        features = output if isinstance(output, Tensor) else output.pooler_output
        return cls(features, rank, scale.exp().squeeze(), 0.0 if bias is None else cast(Tensor, bias).squeeze())

    @property
    def rank(self) -> int:
        return self.weights.shape[1]

    @property
    def text_features(self) -> Tensor:
        """normalize(W B), (N, D), through which no gradient reaches B; a row of zeros stays one."""
        return functional.normalize(self.weights @ self.basis.detach(), dim=-1)

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (..., N) of image features (..., D), which are made of length one."""
        return self.scale * functional.normalize(image_features, dim=-1) @ self.text_features.T + self.bias

    def reconstruction_loss(self, text_features: Tensor) -> Tensor:
        """‖W B − F‖²_F, through which no gradient reaches W, for training B.

        Args:
            text_features: F, of all classes in their order; rows are made of length one.

        Raises:
            ValueError: features of another shape, or not finite.
        """
        features = _checked(text_features)
        if features.shape != (len(self.weights), self.basis.shape[1]):
            raise ValueError(
                f"text_features have shape {tuple(features.shape)}, and the head has {len(self.weights)} classes with "
                f"{self.basis.shape[1]} features."
            )
        return (self.weights.detach() @ self.basis - features).square().sum()

    @torch.no_grad()
    def add_classes(self, text_features: Tensor) -> None:
        """Append classes that were not there before, by projection: w = f B⁺. Weights of the others stay as they are.

        `weights` is a new parameter then, which an optimizer made before does not know.

        Args:
            text_features: (classes, D); rows are made of length one.

        Raises:
            ValueError: features of another width, or not finite.
        """
        features = _checked(text_features)
        if features.shape[1] != self.basis.shape[1]:
            raise ValueError(f"text_features have {features.shape[1]} features, and the basis {self.basis.shape[1]}.")
        new = features.double() @ torch.linalg.pinv(self.basis.double())
        requires_grad = self.weights.requires_grad
        self.weights = nn.Parameter(torch.cat((self.weights, new.to(self.weights))), requires_grad=requires_grad)

    def extra_repr(self) -> str:
        return f"classes={len(self.weights)}, features={self.basis.shape[1]}, rank={self.rank}"


def _checked(text_features: Tensor) -> Tensor:
    if text_features.dim() != 2 or not text_features.is_floating_point() or not bool(text_features.isfinite().all()):
        raise ValueError(
            f"text_features of shape {tuple(text_features.shape)} and dtype {text_features.dtype} must be a matrix of "
            "finite floats, (classes, features)."
        )
    return functional.normalize(text_features.detach(), dim=-1)
