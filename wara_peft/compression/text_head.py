"""The text side of a CLIP-like classifier, in low rank: each class is a few weights of shared basis vectors."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import check_whole_number


class LowRankTextHead(nn.Module):
    """Classifier whose text features are W B: logits = τ z normalize(W B)ᵀ + β.

    The image features z have length one. Row i of W holds the weights of class i, and the rows of B are the basis
    vectors that all classes share. The head starts from F, (N, D), whose rows are the text embeddings of N classes,
    scaled to length one. With the SVD F = P Σ Qᵀ it sets W = P_m Σ_m and B = Q_mᵀ. So ‖F − W B‖²_F = Σ_{i>m} σ_i².
    If m is the rank of F, the head computes what the whole text side does. It has m (N + D) numbers in place of N D.

    The loss of a task trains only W. To train B, unfreeze it and use `reconstruction_loss`.

    After Lei et al., "HOLa", arXiv 2507.15542. HOLa uses principal components without scale and mean, in a detector of
    interactions. This head differs so that it starts as CLIP's own zero-shot classifier.

    Args:
        text_features: F, (N, D), with rows of any length.
        rank: m, at most min(N, D).
        scale: τ, the exponential of CLIP's `logit_scale`.
        bias: β, as SigLIP has.

    Attributes:
        weights: W, (N, m).
        basis: B, (m, D), frozen at first.

    Raises:
        ValueError: `text_features` is no finite matrix, or `rank` is out of its range.
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
        """Make a head from a CLIP-like model of transformers (CLIP, SigLIP, ALIGN, …) and one text for each class.

        Args:
            model: a model that has `get_text_features` and `logit_scale`, and maybe `logit_bias`.
            rank: m.
            text_inputs: `input_ids`, `attention_mask`, … of N tokenized texts.

        Raises:
            TypeError: the model lacks `get_text_features` or `logit_scale`.
        """
        scale = getattr(model, "logit_scale", None)
        if not hasattr(model, "get_text_features") or not isinstance(scale, Tensor):
            raise TypeError(f"{type(model).__name__} has no get_text_features and logit_scale, as CLIP has.")
        bias = getattr(model, "logit_bias", None)
        output = cast(Any, model).get_text_features(**text_inputs)
        # Some versions and models of transformers return the features themselves, others an output with them.
        features = output if isinstance(output, Tensor) else output.pooler_output
        return cls(features, rank, scale.exp().squeeze(), 0.0 if bias is None else cast(Tensor, bias).squeeze())

    @property
    def rank(self) -> int:
        return self.weights.shape[1]

    @property
    def text_features(self) -> Tensor:
        """normalize(W B), (N, D). No gradient flows from it into B. A row of zeros stays zero."""
        return functional.normalize(self.weights @ self.basis.detach(), dim=-1)

    def forward(self, image_features: Tensor) -> Tensor:
        """Give logits (..., N) for image features (..., D) of any length."""
        return self.scale * functional.normalize(image_features, dim=-1) @ self.text_features.T + self.bias

    def reconstruction_loss(self, text_features: Tensor) -> Tensor:
        """Give ‖W B − F‖²_F, the loss that trains B. No gradient flows from it into W.

        Args:
            text_features: F, (N, D), with all classes in the order of the head and rows of any length.

        Raises:
            ValueError: `text_features` has another shape, or is not finite.
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
        """Append new classes by projecting their features onto the basis: w = f B⁺.

        The weights of the other classes stay as they are. Afterwards `weights` is a new parameter, so an optimizer
        that was made before does not train it.

        Args:
            text_features: features of the new classes, (classes, D), with rows of any length.

        Raises:
            ValueError: `text_features` has another width, or it or the basis is not finite.
        """
        features = _checked(text_features)
        if features.shape[1] != self.basis.shape[1]:
            raise ValueError(f"text_features have {features.shape[1]} features, and the basis {self.basis.shape[1]}.")
        if not bool(self.basis.isfinite().all()):
            raise ValueError("The head's basis holds NaN or infinity: make the head again, or load it.")
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
