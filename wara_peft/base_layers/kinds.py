"""The kinds of layers that can be adapted, and the shape of an adapted module.

A new kind needs one file in layers/, with the adapter layer and a `Kind` that is passed to `register`; and a line in
layers/__init__.py, which imports that file. Other code never asks which kind a layer is: it reads what the kind says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..factorized import DictionaryLinear, LowRankLinear


@dataclass(eq=False)
class Kind:
    """What sets a kind of layer apart. Its methods are those of a linear layer; other kinds override them.

    Attributes:
        name: the class's name, as `WaRAConfig.module_shapes` records it.
        base_class: the class of such layers, None for bare parameters.
        keeps_in_first: whether its weight has the shape (in, out), the transpose of ΔW = B̂ Â.
        kernel_dimensions: number of dimensions of a convolution's kernel, 0 for other layers.
        is_linear: whether it multiplies features by a matrix. Forms that transform something else than ΔW, such as
            the grid of patches, need that.
        lora_names: the names under which PEFT's LoRA keeps A and B of such a layer.
        bias_names: the names that its bias may have in the module that has the weight; empty for kinds without bias.
        is_parameter: whether it is no layer, but a bare parameter of a module.
        has_experts: whether that parameter is a stack of one matrix for each expert of a mixture.
        is_factorized: whether it keeps its weight as a product of smaller matrices.
        has_vocabulary: whether its in axis is a vocabulary, so that it may be resized and tied to an output layer.
        layer_class: the adapter layer beside such a layer, a subclass of `WaRALayer`, which sets this itself.
    """

    name: str
    base_class: type[nn.Module] | None = None
    keeps_in_first: bool = False
    kernel_dimensions: int = 0
    is_linear: bool = False
    lora_names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    bias_names: tuple[str, ...] = ("bias",)
    is_parameter: bool = False
    has_experts: bool = False
    is_factorized: bool = False
    has_vocabulary: bool = False
    layer_class: Any = None

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Make a copied or unpickled kind the kind itself, since kinds are compared by identity."""
        return kind_named, (self.name,)

    def weight_shape(self, out_features: int, in_features: int, kernel: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return the shape in which such a layer keeps its weight; for experts, the shape of one expert's."""
        return (in_features, out_features) if self.keeps_in_first else (out_features, in_features, *kernel)

    def shape(self, base: Any) -> ModuleShape:
        """Return the lengths of a layer's axes that the wavelet transform acts on."""
        # PEFT's private function also knows the shapes of weights that are sharded, as by DeepSpeed or DTensor.
        in_features, out_features = cast(tuple[int, int], _get_in_out_features(base))
        return ModuleShape(self, out_features, in_features)

    def inputs(self, base: Any, scale: float, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield inputs to try such a layer with. A layer with its own forward may take only one of their shapes."""
        in_features = self.shape(base).in_features
        for shape in ((1, 3, in_features), (3, in_features)):
            yield scale * torch.randn(shape, generator=generator)

    def product(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Compute what an adapter whose ΔW is `weight` adds to the layer's result for the input x."""
        return F.linear(x, weight.T if self.keeps_in_first else weight)

    def settings_lora_ignores(self, base: Any) -> dict[str, Any]:
        """Return the settings of a layer that PEFT's LoRA ignores, if the layer computes something else for them."""
        return {}


@dataclass(eq=False)
class EmbeddingKind(Kind):
    """`nn.Embedding`, whose result consists of the rows of its weight that tokens name."""

    keeps_in_first: bool = True
    lora_names: tuple[str, str] = ("lora_embedding_A", "lora_embedding_B")
    bias_names: tuple[str, ...] = ()
    has_vocabulary: bool = True

    def inputs(self, base: Any, scale: float, generator: torch.Generator) -> Iterator[Tensor]:
        # Rows in the middle are seldom special, as the row of a padding token is.
        middle = base.num_embeddings // 2
        yield torch.tensor([[middle, max(middle - 1, 0)]])

    def product(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight)


class ConvolutionKind(Kind):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`: only channels are transformed; Â has the kernel's dimensions last."""

    def shape(self, base: Any) -> ModuleShape:
        in_features = base.in_channels // base.groups
        return ModuleShape(self, base.out_channels, in_features, base.groups, tuple(base.kernel_size))

    def inputs(self, base: Any, scale: float, generator: torch.Generator) -> Iterator[Tensor]:
        sizes = zip(base.kernel_size, base.dilation, base.stride, strict=True)
        # The kernel fits in several places along every axis, also without padding.
        lengths = [kernel * dilation + 3 * stride for kernel, dilation, stride in sizes]
        yield scale * torch.randn(1, base.in_channels, *lengths, generator=generator)

    def product(self, base: Any, x: Tensor, weight: Tensor) -> Tensor:
        # PyTorch's private function is the layer's forward with another weight: padding modes are in it.
        return cast(Tensor, base._conv_forward(x, weight, None))

    def settings_lora_ignores(self, base: Any) -> dict[str, Any]:
        settings = {"dilation": base.dilation, "padding_mode": base.padding_mode}
        return settings if set(base.dilation) != {1} or base.padding_mode != "zeros" else {}


class FactorizedKind(Kind):
    """`LowRankLinear` or `DictionaryLinear`. PEFT's function that finds shapes would warn about these classes."""

    def shape(self, base: Any) -> ModuleShape:
        return ModuleShape(self, base.out_features, base.in_features)


KINDS: dict[str, Kind] = {}
"""All kinds by name."""
_BY_CLASS: dict[type[nn.Module], Kind] = {}


def register(kind: Kind) -> Kind:
    """Add a kind, so that its layers can be adapted, and return it."""
    KINDS[kind.name] = kind
    if kind.base_class is not None:
        _BY_CLASS[kind.base_class] = kind
    return kind


def kind_named(name: str) -> Kind:
    """The kind of that name."""
    return KINDS[name]


def supported_classes() -> str:
    """List the classes of layers that can be adapted, for messages."""
    return ", ".join(f"`{cls.__module__}.{cls.__name__}`" for cls in (*_BY_CLASS, nn.MultiheadAttention))


LINEAR = register(Kind("Linear", nn.Linear, is_linear=True))
CONV1D = register(Kind("Conv1D", Conv1D, keeps_in_first=True, is_linear=True))
EMBEDDING = register(EmbeddingKind("Embedding", nn.Embedding))
CONVOLUTIONS = [
    register(ConvolutionKind(cls.__name__, cls, kernel_dimensions=dimensions))
    for dimensions, cls in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)
]
FACTORIZED = [
    register(FactorizedKind(cls.__name__, cls, is_linear=True, is_factorized=True, bias_names=("bias", "up.bias")))
    for cls in (LowRankLinear, DictionaryLinear)
]
MATRIX = register(Kind("Parameter", is_parameter=True))
IN_PROJ = register(Kind("MultiheadAttention", is_parameter=True, bias_names=()))
EXPERTS = register(Kind("Experts", is_parameter=True, has_experts=True))
EXPERTS_IN_FIRST = register(Kind("ExpertsInFirst", keeps_in_first=True, is_parameter=True, has_experts=True))


class BareParameter(nn.Module):
    """Presents a parameter of a module as the weight of a layer. It owns neither the parameter nor the module.

    Args:
        owner: the module that has the parameter.
        name: the parameter's name in its owner.
        kind: the parameter's kind, if its shape does not tell it.
        inside: the owner's name in the module whose forward uses the parameter, if that is not the owner.

    Attributes:
        kind: by default "Parameter" for a matrix (m, n), "Experts" for (experts, m, n), and "ExpertsInFirst" for
            (experts, n, m). Modules say by an attribute `is_transposed` that they have the last of these.
        shape, dtype: those of the parameter, also where DeepSpeed has partitioned it.
        position: how many of the owner's parameters come before it.
    """

    def __init__(self, owner: nn.Module, name: str, kind: Kind | None = None, inside: str = "") -> None:
        super().__init__()
        self._owner = [owner]  # in a list, so that PyTorch does not register it as a part of this module
        self.training = owner.training
        self.name, self.inside = name, inside
        weight = self.weight
        self.shape, self.dtype = tuple(getattr(weight, "ds_shape", weight.shape)), weight.dtype
        in_first = bool(getattr(owner, "is_transposed", False))
        by_shape = MATRIX if len(self.shape) == 2 else EXPERTS_IN_FIRST if in_first else EXPERTS
        self.kind = kind or by_shape
        # PyTorch moves parameters that are parametrized from the first of these dicts to the second.
        self.position = [*owner._parameters, *getattr(owner, "parametrizations", ())].index(name)

    @property
    def owner(self) -> nn.Module:
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        """The parameter. If it is parametrized, as quantized experts are, every access computes its value again."""
        return cast(Tensor, getattr(self.owner, self.name))

    @property
    def bias(self) -> nn.Parameter | None:
        """The owner's bias, which belongs to the weight if the owner is a layer."""
        return getattr(self.owner, "bias", None)

    @property
    def module_shape(self) -> ModuleShape:
        """The parameter's kind and the lengths of its axes."""
        out_features, in_features = self.shape[-2:][::-1] if self.kind.keeps_in_first else self.shape[-2:]
        experts = self.shape[0] if self.kind.has_experts else 0
        return ModuleShape(self.kind, out_features, in_features, experts=experts, position=self.position)


def known_kind(module: object) -> Kind | None:
    """Return the kind of a layer by its class, or by the nearest base class that has a kind; None if there is none."""
    return next((_BY_CLASS[cls] for cls in type(module).__mro__ if cls in _BY_CLASS), None)


def kind_of(base_layer: nn.Module) -> Kind:
    """Return the kind of an adapted layer. One whose class has no kind is quantized, and all of these are linear."""
    return base_layer.kind if isinstance(base_layer, BareParameter) else known_kind(base_layer) or LINEAR


def shape_of(base_layer: nn.Module) -> ModuleShape:
    """Return the shape of an adapted layer or bare parameter."""
    return base_layer.module_shape if isinstance(base_layer, BareParameter) else kind_of(base_layer).shape(base_layer)


@dataclass(frozen=True)
class ModuleShape:
    """The kind and the shape of an adapted module.

    Attributes:
        kind: the kind of its base layer.
        out_features, in_features: lengths of the axes that are transformed. For a convolution `in_features` counts
            the in channels of one group.
        groups: number of groups of a convolution. Every group has the same Â and its own rows of B̂.
        kernel: kernel size of a convolution, whose dimensions follow the channels of Â untransformed.
        experts: number of experts, each of which has its own Â and B̂; 0 for kinds without experts.
        position: for a bare parameter, how many of its module's parameters come before it. If several are adapted,
            PEFT's names for LoRA's tensors depend on that.
    """

    kind: Kind
    out_features: int
    in_features: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    experts: int = 0
    position: int = 0

    @classmethod
    def of_list(cls, kind: Kind, sizes: list[int]) -> ModuleShape:
        """Make a shape from what `as_list` returns after the kind's name."""
        out_features, in_features = sizes[:2]
        if kind.is_parameter:
            experts, position = (*sizes[2:], 0, 0)[:2]
            return cls(kind, out_features, in_features, experts=experts, position=position)
        return cls(kind, out_features, in_features, sizes[2] if len(sizes) > 2 else 1)

    @property
    def lengths(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape in which the base layer keeps its weight."""
        shape = self.kind.weight_shape(self.out_features, self.in_features, self.kernel)
        return (self.experts, *shape) if self.kind.has_experts else shape

    def parameter_of(self, name: str) -> str:
        """Return the name of the weight in the model; `name` is the name under which it is adapted."""
        return name if self.kind.is_parameter else f"{name}.weight"

    def biases_of(self, name: str) -> list[str]:
        """Return the names that the bias may have in the model; none for kinds without bias."""
        owner = self.parameter_of(name).rpartition(".")[0]
        return [f"{owner}.{bias}" for bias in self.kind.bias_names]

    def as_list(self) -> list[str | int]:
        """Return the entry for `WaRAConfig.module_shapes`.

        For a layer it is [kind, out, in], and the number of groups behind it if there are several. For a parameter it
        is [kind, out, in, experts, position].
        """
        if self.kind.is_parameter:
            return [self.kind.name, *self.lengths, self.experts, self.position]
        return [self.kind.name, *self.lengths, *([self.groups] if self.groups > 1 else [])]
