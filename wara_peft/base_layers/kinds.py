"""The kinds of layers that can be adapted, and the shape of an adapted module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..factorized import DictionaryLinear, LowRankLinear


@dataclass(frozen=True)
class Kind:
    """What sets a kind of layer apart.

    Attributes:
        name: the class's name, as `WaRAConfig.module_shapes` records it.
        keeps_in_first: whether its weight is (in, out), the transpose of ΔW = B̂ Â.
        kernel_dimensions: number of dimensions of a convolution's kernel, 0 for other layers.
        is_linear: whether it multiplies features by a matrix, as forms need that transform something else than ΔW.
        lora_names: the names under which PEFT's LoRA keeps A and B of such a layer.
        is_parameter: whether it is no layer, but a bare parameter of a module.
        has_experts: whether that parameter is a stack of one matrix for each expert of a mixture.
        is_factorized: whether it keeps its weight as a product of smaller matrices.
    """

    name: str
    keeps_in_first: bool = False
    kernel_dimensions: int = 0
    is_linear: bool = False
    lora_names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    is_parameter: bool = False
    has_experts: bool = False
    is_factorized: bool = False

    def weight_shape(self, out_features: int, in_features: int, kernel: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Shape in which such a layer keeps its weight; of experts that of one of them."""
        return (in_features, out_features) if self.keeps_in_first else (out_features, in_features, *kernel)


LINEAR = Kind("Linear", is_linear=True)
_BY_CLASS: dict[type[nn.Module], Kind] = {
    Conv1D: Kind("Conv1D", keeps_in_first=True, is_linear=True),
    nn.Embedding: Kind("Embedding", keeps_in_first=True, lora_names=("lora_embedding_A", "lora_embedding_B")),
    nn.Conv1d: Kind("Conv1d", kernel_dimensions=1),
    nn.Conv2d: Kind("Conv2d", kernel_dimensions=2),
    nn.Conv3d: Kind("Conv3d", kernel_dimensions=3),
    LowRankLinear: Kind("LowRankLinear", is_linear=True, is_factorized=True),
    DictionaryLinear: Kind("DictionaryLinear", is_linear=True, is_factorized=True),
}
MATRIX = Kind("Parameter", is_parameter=True)
IN_PROJ = Kind("MultiheadAttention", is_parameter=True)
EXPERTS = Kind("Experts", is_parameter=True, has_experts=True)
EXPERTS_IN_FIRST = Kind("ExpertsInFirst", keeps_in_first=True, is_parameter=True, has_experts=True)
KINDS = {kind.name: kind for kind in (LINEAR, *_BY_CLASS.values(), MATRIX, IN_PROJ, EXPERTS, EXPERTS_IN_FIRST)}

FACTORIZED = {kind.name for kind in KINDS.values() if kind.is_factorized}


class BareParameter(nn.Module):
    """A parameter of a module as if it were the weight of a layer; it owns neither of the two.

    Args:
        owner: the module that has the parameter.
        name: the parameter's name in it.
        kind: what it is, if that is not told by its shape.
        inside: where the owner lies in the module whose own forward uses the parameter, if that is another one.

    Attributes:
        kind: if not given, "Parameter" for a matrix (m, n), "Experts" for (experts, m, n), and "ExpertsInFirst" for
            (experts, n, m), as modules say of themselves by an attribute `is_transposed`.
        shape, dtype: those of the parameter, also where DeepSpeed has partitioned it.
        position: how many of the owner's parameters come before it.
    """

    def __init__(self, owner: nn.Module, name: str, kind: Kind | None = None, inside: str = "") -> None:
        super().__init__()
        self._owner = [owner]  # in a list, so that it is not registered as a part of this module
        self.training = owner.training
        self.name, self.inside = name, inside
        weight = self.weight
        self.shape, self.dtype = tuple(getattr(weight, "ds_shape", weight.shape)), weight.dtype
        in_first = bool(getattr(owner, "is_transposed", False))
        by_shape = MATRIX if len(self.shape) == 2 else EXPERTS_IN_FIRST if in_first else EXPERTS
        self.kind = kind or by_shape
        self.position = [*owner._parameters, *getattr(owner, "parametrizations", ())].index(name)

    @property
    def owner(self) -> nn.Module:
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        """The parameter; where it is parametrized, as quantized experts are, what it stands for, computed anew."""
        return cast(Tensor, getattr(self.owner, self.name))

    @property
    def bias(self) -> nn.Parameter | None:
        """That of the owner, which is what it is for where the owner is a layer."""
        return getattr(self.owner, "bias", None)

    @property
    def module_shape(self) -> ModuleShape:
        """The parameter as something that is adapted."""
        out_features, in_features = self.shape[-2:][::-1] if self.kind.keeps_in_first else self.shape[-2:]
        return ModuleShape(self.kind, out_features, in_features, experts=self.experts, position=self.position)

    @property
    def experts(self) -> int:
        """Number of experts, 0 for a matrix."""
        return self.shape[0] if self.kind.has_experts else 0


def loras_targets(kinds: Mapping[str, Kind]) -> tuple[list[str], list[str]]:
    """By what PEFT targets all that is adapted: modules, parameters; an attention stands for its weights."""
    attentions = {name.rpartition(".")[0] for name, kind in kinds.items() if kind is IN_PROJ}
    modules = [name for name, kind in kinds.items() if not kind.is_parameter and attention_of(name) not in attentions]
    parameters = [name for name, kind in kinds.items() if kind.is_parameter and kind is not IN_PROJ]
    return [*modules, *sorted(attentions)], parameters


def attention_of(name: str) -> str | None:
    """The `nn.MultiheadAttention` whose output projection would have this name."""
    return name.removesuffix(".out_proj") if name.endswith(".out_proj") else None


def kind_of(base_layer: nn.Module) -> Kind:
    """The kind of a layer that is adapted: of the classes named above, else linear, as all quantized layers are."""
    if isinstance(base_layer, BareParameter):
        return base_layer.kind
    return next((kind for cls, kind in _BY_CLASS.items() if isinstance(base_layer, cls)), LINEAR)


def shape_of(base_layer: nn.Module) -> ModuleShape:
    """Lengths of the out and in axes that are transformed; in grouped convolutions a group's in channels."""
    if isinstance(base_layer, BareParameter):
        return base_layer.module_shape
    kind = kind_of(base_layer)
    if kind.is_factorized:  # of which PEFT's function would warn
        return ModuleShape(kind, cast(int, base_layer.out_features), cast(int, base_layer.in_features))
    in_features, out_features = cast(tuple[int, int], _get_in_out_features(base_layer))
    groups, kernel = getattr(base_layer, "groups", 1), getattr(base_layer, "kernel_size", ())
    return ModuleShape(kind, out_features, in_features // groups, groups, tuple(kernel))


@dataclass(frozen=True)
class ModuleShape:
    """An adapted module.

    Attributes:
        kind: what its base layer is.
        out_features, in_features: lengths of the axes that are transformed; of a convolution the in channels of one
            group.
        groups: number of groups of a convolution. Every group has the same Â and its own rows of B̂.
        kernel: kernel size of a convolution, whose dimensions follow the channels of Â untransformed.
        experts: number of experts, each of which has its own Â and B̂; 0 for all that is no stack of experts.
        position: of a bare parameter how many of its module's parameters come before it, by which PEFT names LoRA's
            tensors where several are adapted.
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
        """What `as_list` describes, without the kind's name."""
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
        """The model's name of the weight, where `name` is that under which it is adapted."""
        return name if self.kind.is_parameter else f"{name}.weight"

    def as_list(self) -> list[str | int]:
        """As `WaRAConfig.module_shapes` has it.

        [kind, out, in], and the groups where there are several; [kind, out, in, experts, position] of a parameter.
        """
        if self.kind.is_parameter:
            return [self.kind.name, *self.lengths, self.experts, self.position]
        return [self.kind.name, *self.lengths, *([self.groups] if self.groups > 1 else [])]
