"""Finds weights that bitsandbytes quantized among the tensors of files, checks their tensors, dequantizes them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from .tensors import FLOATS, TensorInfo

STATE = "quant_state.bitsandbytes__"
"""How the name of the tensor begins that holds shape, dtype and sizes of blocks of a 4-bit weight, as JSON."""
DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in FLOATS.items()}
"""By PyTorch's name of a float dtype, safetensors' name."""
_OF_FOUR_BITS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_OF_EIGHT_BITS = ("SCB", "weight_format")


def descriptions(keys: Collection[str]) -> dict[str, dict[str, str]]:
    """For the key of each quantized weight, the keys of the tensors that describe it, by bitsandbytes' names."""
    found = {}
    for key in keys:
        weight, is_state, kind = key.partition(f".{STATE}")
        if is_state:
            parts = {name: f"{weight}.{name}" for name in _OF_FOUR_BITS}
            found[weight] = {name: part for name, part in parts.items() if part in keys} | {STATE + kind: key}
        elif key.endswith(".SCB"):
            layer = key.removesuffix(".SCB")
            parts = {name: f"{layer}.{name}" for name in _OF_EIGHT_BITS}
            found[f"{layer}.weight"] = {name: part for name, part in parts.items() if part in keys}
    return found


def state_of(state: Tensor) -> dict[str, Any]:
    """What the tensor says whose name begins with `STATE`."""
    from bitsandbytes.utils import unpack_tensor_to_dict

    return dict(unpack_tensor_to_dict(state))  # type: ignore[no-untyped-call]


def dense_shape(weight: TensorInfo | None, parts: Mapping[str, TensorInfo], state: Any) -> tuple[int, ...]:
    """The shape of the dense weight.

    bitsandbytes trusts what it reads, and would read beyond tensors that are too small.

    Args:
        weight: the tensor of the quantized weight; None if there is none.
        parts: the tensors that describe it by their names.
        state: what `state_of` returns for 4 bits; None for 8.

    Raises:
        KeyError, TypeError, ValueError: the tensors do not fit each other.
    """
    if weight is None:
        raise ValueError("the weight itself is missing")
    if state is None:
        shape, size = weight.shape, math.prod(weight.shape)
        expected = {"SCB": TensorInfo(shape[:1], "F32")}
        if weight.dtype != "I8" or len(shape) != 2:
            raise ValueError(f"the weight is {weight}")
    else:
        shape, block, nested_block = tuple(state["shape"]), state["blocksize"], state.get("nested_blocksize", 1)
        if not all(type(count) is int and count > 0 for count in (*shape, block, nested_block)):
            raise ValueError(f"shape {shape} in blocks of {block} and {nested_block}")
        if state["dtype"] not in DTYPES:
            raise ValueError(f"dtype {state['dtype']!r}")
        size, blocks = math.ceil(math.prod(shape) / 2), math.ceil(math.prod(shape) / block)
        expected = {"absmax": TensorInfo((blocks,), "F32"), "quant_map": TensorInfo((16,), "F32")}
        if "nested_absmax" in parts or "nested_blocksize" in state:
            if state["nested_dtype"] not in DTYPES:
                raise ValueError(f"nested_dtype {state['nested_dtype']!r}")
            float(state["nested_offset"])
            expected["absmax"] = TensorInfo((blocks,), "U8")
            expected["nested_absmax"] = TensorInfo((math.ceil(blocks / nested_block),), "F32")
            expected["nested_quant_map"] = TensorInfo((256,), "F32")
    found = {name: parts.get(name) for name in expected}
    if found != expected:
        raise ValueError(f"{found} where {expected} were expected")
    if size_in_bytes(weight) != size:
        raise ValueError(f"the weight has {size_in_bytes(weight)} bytes where {size} were expected")
    return shape


def dequantized(weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """The dense weight, in the dtype in which bitsandbytes computes it: 4 bits in their own, 8 bits in float32.

    Args:
        weight: the quantized weight.
        parts: the tensors that describe it by their names, after `dense_shape` has checked them.
    """
    import bitsandbytes.functional as functional

    if "SCB" in parts:
        return cast(Tensor, functional.int8_vectorwise_dequant(weight, parts["SCB"]))
    return functional.dequantize_4bit(weight, functional.QuantState.from_dict(dict(parts), torch.device("cpu")))


def rounded(weight: Tensor, parameter: Any) -> Tensor:
    """What a dense weight becomes if it is quantized and dequantized.

    Args:
        weight: the weight in the dtype in which it is quantized.
        parameter: the parameter without values that transformers has put in its place: it says how to quantize.
    """
    import bitsandbytes.functional as functional

    # bitsandbytes quantizes a parameter when it arrives on a device.
    quantized = type(parameter)(weight, requires_grad=False, **vars(parameter)).to("cpu")
    if quantized.dtype == torch.int8:
        return cast(Tensor, functional.int8_vectorwise_dequant(quantized.data, quantized.SCB))
    return functional.dequantize_4bit(quantized.data, quantized.quant_state)


def size_in_bytes(info: TensorInfo) -> int:
    """How many bytes a tensor takes in a file."""
    bits = re.search(r"\d+", info.dtype)
    return math.prod(info.shape) * (8 if bits is None else int(bits[0])) // 8  # BOOL takes a byte
