"""Handles quantized base layers where PEFT's quantization backends are not enough."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn

from .kinds import LINEAR, Kind, kind_of, known_kind

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that are not quantized."""


def base_weight(base_layer: nn.Module, backend: QuantizationBackend | None) -> Tensor:
    """Return the weight (m, n) of a linear layer, dequantized."""
    keep_unpacked(base_layer)
    weight = cast(Tensor, base_layer.weight).data if backend is None else backend.get_base_weight(base_layer)
    return weight.T if kind_of(base_layer).keeps_in_first else weight


def adaptable_kind(base_layer: nn.Module, **quantization: Any) -> Kind | None:
    """Return the kind of a layer that can be adapted, quantized linear layers included; None for other layers.

    Args:
        base_layer: the layer.
        quantization: arguments for PEFT's quantization backends, as PEFT's `get_quantization_kwargs` finds them.
    """
    kind = known_kind(base_layer)
    if kind is not None:
        return kind
    backend = resolve_quantization_backend(base_layer, **quantization)
    return LINEAR if backend is not None and backend.layer_type == "linear" else None


def keep_unpacked(model: nn.Module) -> None:
    """Keep the 4-bit weights of bitsandbytes in the layout that its own dequantization reads.

    On CPUs with AVX512-BF16 bitsandbytes 0.50.2 repacks a weight in place at the first forward in eval mode, and
    rounds its block scales to bfloat16. Merging would then add to a wrong weight. `state_dict`, which every save
    calls, would leave scales behind that belong to the other layout. So this switches repacking off, and brings back a
    weight that has been repacked already.

    Args:
        model: any module; only its `bitsandbytes.nn.Linear4bit` layers change.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            _switch_off_repacking(module)


def _switch_off_repacking(module: Any) -> None:
    module.support_avx512bf16_for_cpu = False
    weight, state = module.weight, module.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return
    try:
        # bitsandbytes has no public way back from its packed layout.
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
    except ImportError as error:
        raise ImportError(
            "This bitsandbytes has packed a 4-bit weight for the CPU, and no longer says how to unpack it. Add the "
            "adapter before the first forward in eval mode, or install a version that wara-peft names: "
            "pip install 'wara-peft[quant]'."
        ) from error

    if not state.original_nested:
        # The inverse leaves the scales as they were for the packed layout: (blocks in a row, rows), in bfloat16.
        state.absmax = state.absmax.T.reshape(-1).to(torch.float32)
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    module.quant_state = weight.quant_state
