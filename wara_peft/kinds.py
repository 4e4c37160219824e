"""The kinds of layers that can be adapted, and the shape of an adapted module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Kind:
    """What sets a kind of layer apart.

    Attributes:
        name: the class's name, as `WaRAConfig.module_shapes` records it.
        keeps_in_first: whether its weight is (in, out), the transpose of ΔW = B̂ Â.
        kernel_dimensions: number of dimensions of a convolution's kernel, 0 for other layers.
        is_linear: whether it multiplies features by a matrix, as forms need that transform something else than ΔW.
        lora_names: the names under which PEFT's LoRA keeps A and B of such a layer.
    """

    name: str
    keeps_in_first: bool = False
    kernel_dimensions: int = 0
    is_linear: bool = False
    lora_names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")

    def weight_shape(self, out_features: int, in_features: int, kernel: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Shape in which such a layer keeps its weight."""
        return (in_features, out_features) if self.keeps_in_first else (out_features, in_features, *kernel)


LINEAR = Kind("Linear", is_linear=True)
_BY_CLASS: dict[type[nn.Module], Kind] = {
    Conv1D: Kind("Conv1D", keeps_in_first=True, is_linear=True),
    nn.Embedding: Kind("Embedding", keeps_in_first=True, lora_names=("lora_embedding_A", "lora_embedding_B")),
    nn.Conv1d: Kind("Conv1d", kernel_dimensions=1),
    nn.Conv2d: Kind("Conv2d", kernel_dimensions=2),
    nn.Conv3d: Kind("Conv3d", kernel_dimensions=3),
}
KINDS = {kind.name: kind for kind in (LINEAR, *_BY_CLASS.values())}


def kind_of(base_layer: nn.Module) -> Kind:
    """The kind of a layer that is adapted: of the classes named above, else linear, as all quantized layers are."""
    return next((kind for cls, kind in _BY_CLASS.items() if isinstance(base_layer, cls)), LINEAR)


@dataclass(frozen=True)
class ModuleShape:
    """An adapted module.

    Attributes:
        kind: what its base layer is.
        out_features, in_features: lengths of the axes that are transformed; of a convolution the in channels of one
            group.
        groups: number of groups of a convolution. Every group has the same Â and its own rows of B̂.
        kernel: kernel size of a convolution, whose dimensions follow the channels of Â untransformed.
    """

    kind: Kind
    out_features: int
    in_features: int
    groups: int = 1
    kernel: tuple[int, ...] = ()

    @property
    def lengths(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape in which the base layer keeps its weight."""
        return self.kind.weight_shape(self.out_features, self.in_features, self.kernel)

    def as_list(self) -> list[str | int]:
        """As `WaRAConfig.module_shapes` has it: [kind, out, in], and the groups where there are several."""
        return [self.kind.name, *self.lengths, *([self.groups] if self.groups > 1 else [])]
