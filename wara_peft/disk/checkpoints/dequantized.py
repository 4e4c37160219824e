"""Reads the weights that bitsandbytes quantized, or would quantize, as the dense weights that they stand for."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ...base_layers.kinds import known_kind
from ...factorized.marks import METHOD
from ...messages import first_few
from .checkpoint import Checkpoint, read_json
from .skeleton import keys_of_parameters
from .tensors import FLOATS, TensorInfo

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""By the name of a quantization, the arguments of transformers' `BitsAndBytesConfig`."""
STATE = ".quant_state.bitsandbytes__"
"""What stands between the key of a 4-bit weight and the name of its type in the key of the weight's description."""
SHARD_BYTES = 5 * 10**9
"""Dense weights of one file that take more than this are written to several files."""
_INSTALL = "bitsandbytes, which reads and rounds quantized weights, is missing: pip install 'wara-peft[quant]'."
_DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in FLOATS.items()}


class DequantizedCheckpoint(Checkpoint):
    """A checkpoint in which each quantized weight is read as the dense weight that the quantized model computes with.

    `tensors` has the shapes and dtypes of these dense weights, and `file_of` the files that they are written to.
    Tensors that only describe a quantized weight, such as its scales, are in neither.

    Args:
        base: the directory, as `save_pretrained` writes it for a model that bitsandbytes quantized or for a dense one.
        quantization: a key of `QUANTIZATIONS`. It says how the weights of a dense checkpoint are rounded. None means
            that the checkpoint holds quantized weights.

    Raises:
        FileNotFoundError: as in `Checkpoint`.
        ImportError: bitsandbytes is missing.
        ValueError: as in `Checkpoint`; or another method than bitsandbytes quantized the checkpoint; or its weights
            are quantized and `quantization` is given, or neither; or the tensors of a weight do not fit each other.
    """

    def __init__(self, base: Path, quantization: str | None = None) -> None:
        if quantization is not None and quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization={quantization!r} is not one of {', '.join(map(repr, QUANTIZATIONS))}.")
        try:
            import bitsandbytes.functional
        except ImportError as error:
            raise ImportError(_INSTALL) from error
        self._functional = bitsandbytes.functional
        super().__init__(base)
        self.quantization = quantization
        fields = read_json(base / CONFIG_NAME) if (base / CONFIG_NAME).is_file() else {}
        is_marked = self._check_method(fields.get("quantization_config"))
        self._read_from = dict(self.file_of)
        # By the key of each weight that is stored quantized, the keys of the tensors that describe it, by their names.
        self._descriptions: dict[str, dict[str, str]] = {}
        # By the key of each weight that is to be rounded, its parameter in the quantized model, on the meta device.
        self._rounded: dict[str, Any] = {}
        self._turned: set[str] = set()
        self._find_quantized()
        self._check_is_quantized(is_marked)
        for key in {key for description in self._descriptions.values() for key in description.values()}:
            del self.file_of[key], self.tensors[key]
        self._dtype = self._dtype_on_loading(fields)
        shapes = {key: self._dense_shape(key) for key in self._descriptions}
        self.tensors.update({key: TensorInfo(shape, self._dtype) for key, shape in shapes.items()})
        self._check_others()
        self._divide_files()

    def _check_method(self, entry: Any) -> bool:
        """Refuse methods other than bitsandbytes; whether the config says that bitsandbytes quantized the weights."""
        if not isinstance(entry, dict) or entry.get("quant_method") == METHOD:
            return False
        # Configs of an older transformers have these two fields only.
        is_older = "quant_method" not in entry and ("load_in_4bit" in entry or "load_in_8bit" in entry)
        if not is_older and entry.get("quant_method") != "bitsandbytes":
            raise ValueError(
                f"{str(self.base)!r} is quantized by {entry.get('quant_method')!r}, and only weights of "
                "'bitsandbytes' are dequantized. Merge into the 16-bit model it was made from, without "
                "dequantize=True (--dequantize), and quantize the result."
            )
        return True

    def _find_quantized(self) -> None:
        for key in self.tensors:
            weight, found, _ = key.partition(STATE)
            if found:
                names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
                parts = {name: f"{weight}.{name}" for name in names if f"{weight}.{name}" in self.tensors}
                self._descriptions[weight] = {**parts, key.removeprefix(f"{weight}."): key}
            elif key.endswith(".SCB"):
                layer = key.removesuffix(".SCB")
                parts = {name: f"{layer}.{name}" for name in ("SCB", "weight_format")}
                self._descriptions[f"{layer}.weight"] = {k: v for k, v in parts.items() if v in self.tensors}

    def _check_is_quantized(self, is_marked: bool) -> None:
        name, is_quantized = str(self.base), bool(self._descriptions) or is_marked
        if self.quantization is not None and is_quantized:
            raise ValueError(
                f"{name!r} is quantized already, and quantization={self.quantization!r} is for a base that is not. "
                "Leave it out; the base's own tensors say how it is quantized."
            )
        if self.quantization is None and not self._descriptions:
            raise ValueError(
                f"{name!r} holds no weight that bitsandbytes quantized. Merge without dequantize=True (--dequantize), "
                "or name the quantization that the adapter was trained beside: quantization='nf4' (--quantization "
                f"nf4), or another of {', '.join(QUANTIZATIONS)}."
            )

    def _dtype_on_loading(self, fields: dict[str, Any]) -> str:
        """The dtype that transformers loads the model in, by safetensors' name."""
        named = fields.get("dtype") or fields.get("torch_dtype")
        if isinstance(named, str) and named.removeprefix("torch.") in _DTYPES:
            return _DTYPES[named.removeprefix("torch.")]
        others = (info.dtype for key, info in self.tensors.items() if key not in self._descriptions)
        return next((dtype for dtype in others if dtype in FLOATS), "F16")

    def _dense_shape(self, key: str) -> tuple[int, ...]:
        """The shape of the dense weight, after a check that bitsandbytes will not read beyond the weight's tensors."""
        parts = self._descriptions[key]
        found = {name: self._header(part) for name, part in parts.items()}
        weight = self._header(key)
        if "SCB" in parts:
            fits = weight is not None and weight.dtype == "I8" and len(weight.shape) == 2
            if not fits or found["SCB"] != TensorInfo(weight.shape[:1], "F32"):  # type: ignore[union-attr]
                raise self._unfit(key, f"is {weight}, and its scales are {found['SCB']}")
            return weight.shape  # type: ignore[union-attr]
        try:
            state = self._state(key)
            shape, block, nested = state["shape"], state["blocksize"], "nested_absmax" in parts
            whole = [*shape, block, state["nested_blocksize"] if nested else 1]
            if not all(type(size) is int and size > 0 for size in whole) or state["dtype"] not in _DTYPES:
                raise ValueError(f"sizes {whole} and dtype {state['dtype']!r}")
            blocks = math.ceil(math.prod(shape) / block)
            expected = {"absmax": blocks, "quant_map": 16}
            if nested:
                expected |= {"nested_absmax": math.ceil(blocks / whole[-1]), "nested_quant_map": 256}
                float(state["nested_offset"]), getattr(torch, state["nested_dtype"])
            scales = "U8" if nested else "F32"
            dtypes = {"absmax": scales, "quant_map": "F32", "nested_absmax": "F32", "nested_quant_map": "F32"}
            counts = {name: found[name].shape for name in expected}  # type: ignore[union-attr]
            if counts != {name: (count,) for name, count in expected.items()}:
                raise ValueError(f"{counts} where {expected} were expected")
            if any(found[name].dtype != dtypes[name] for name in expected):  # type: ignore[union-attr]
                raise ValueError(f"dtypes {[found[name] for name in expected]}")
            if weight is None or _bytes(weight) != math.ceil(math.prod(shape) / 2):
                raise ValueError(f"{weight} for {math.prod(shape)} values of 4 bits")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._unfit(key, f"has {type(error).__name__}: {error}") from error
        return tuple(shape)

    def _state(self, key: str) -> dict[str, Any]:
        from bitsandbytes.utils import unpack_tensor_to_dict

        (part,) = (part for name, part in self._descriptions[key].items() if f".{name}".startswith(STATE))
        state: dict[str, Any] = unpack_tensor_to_dict(self._stored(part))  # type: ignore[no-untyped-call]
        return state

    def _header(self, key: str) -> TensorInfo | None:
        name = self._read_from.get(key)
        return None if name is None else self._opened[name].tensors[key]

    def _unfit(self, key: str, what: str) -> ValueError:
        return ValueError(f"Cannot dequantize {key!r} in {str(self.base)!r}: it {what}. Use a complete copy.")

    def _check_others(self) -> None:
        """Refuse weights in eight bits that no other tensor describes."""
        unknown = [
            f"{key!r} ({info.dtype})"
            for key, info in self.tensors.items()
            if info.dtype in ("I8", "U8") or info.dtype.startswith(("F8", "F4"))
        ]
        if unknown:
            raise ValueError(
                f"Cannot dequantize {first_few(unknown)} in {str(self.base)!r}: no other tensors say how bitsandbytes "
                "quantized this. Merge into the 16-bit model it was made from, without dequantize=True (--dequantize)."
            )

    def _divide_files(self) -> None:
        """Give the dense weights of a large file to several files."""
        number, taken, before, numbers = 0, 0, None, {}
        for key, file in self.file_of.items():
            size = _bytes(self.tensors[key])
            if file != before or (taken and taken + size > SHARD_BYTES):
                number, taken, before = number + 1, 0, file
            taken += size
            numbers[key] = number
        if number > len(set(self.file_of.values())):
            stem = SAFE_WEIGHTS_NAME.removesuffix(".safetensors")
            self.file_of = {key: f"{stem}-{n:05d}-of-{number:05d}.safetensors" for key, n in numbers.items()}

    def prepare(self, model: PreTrainedModel) -> None:
        """Learn from the model which weights are rounded, and which ones bitsandbytes keeps transposed.

        Args:
            model: the dense model without weights, of the class that was quantized.

        Raises:
            ValueError: transformers would quantize a weight after it has converted it.
        """
        keys_of = keys_of_parameters(model, self)
        for name, module in model.named_modules():
            kind = known_kind(module)
            # bitsandbytes has no layer that keeps (in, out), so transformers transposes the weight for it.
            if kind is not None and kind.is_linear and kind.keeps_in_first:
                self._turned.update(keys_of.get(f"{name}.weight", []))
        for key in self._turned & self._descriptions.keys():
            info = self.tensors[key]
            self.tensors[key] = replace(info, shape=info.shape[::-1])
        if self.quantization is None:
            return
        is_converted = any(key not in {k for keys in keys_of.values() for k in keys} for key in self.tensors)
        for name, parameter in self._quantized_parameters(model).items():
            keys = keys_of.get(name, [])
            if len(keys) > 1 or (not keys and is_converted):
                raise ValueError(
                    f"Cannot round {name!r}: transformers fuses or converts tensors of {str(self.base)!r} into this "
                    "weight, and then quantizes it. Load the base in this quantization, save it, and merge into that."
                )
            for key in keys:  # a model may have weights that the checkpoint lacks
                self._rounded[key] = parameter
                self.tensors[key] = replace(self.tensors[key], dtype=self._dtype)

    def _quantized_parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """The parameters that transformers quantizes when it loads the model, by name; they have no values."""
        config = BitsAndBytesConfig(**QUANTIZATIONS[str(self.quantization)])  # type: ignore[no-untyped-call]
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantized = copy.deepcopy(model)
        with torch.device("meta"):
            quantizer.preprocess_model(quantized, device_map=None)
        return {
            name: parameter
            for name, parameter in quantized.named_parameters()
            if quantizer.param_needs_quantization(quantized, name)
        }

    def read(self, key: str) -> Tensor:
        """Read a tensor; a quantized weight is read in the dtype in which bitsandbytes dequantizes it."""
        if key not in self._descriptions and key not in self._rounded:
            return self._stored(key)
        weight = self._dequantized(key) if key in self._descriptions else self._as_rounded(key)
        return weight.T if key in self._turned else weight

    def _stored(self, key: str) -> Tensor:
        (tensor,) = self._opened[self._read_from[key]].read([key])
        return tensor

    def _dequantized(self, key: str) -> Tensor:
        parts = {name: self._stored(part) for name, part in self._descriptions[key].items()}
        weight, functional = self._stored(key), self._functional
        if "SCB" in parts:
            return cast(Tensor, functional.int8_vectorwise_dequant(weight, parts["SCB"]))
        state = functional.QuantState.from_dict(parts, torch.device("cpu"))
        return cast(Tensor, functional.dequantize_4bit(weight, state))

    def _as_rounded(self, key: str) -> Tensor:
        """The weight as transformers loads and bitsandbytes quantizes it, dequantized."""
        value, model = self._stored(key).to(FLOATS[self._dtype]), self._rounded[key]
        value = value.T if key in self._turned else value
        weight = type(model)(value, requires_grad=False, **vars(model)).to("cpu")
        if weight.dtype == torch.int8:
            return cast(Tensor, self._functional.int8_vectorwise_dequant(weight.data, weight.SCB))
        return self._functional.dequantize_4bit(weight.data, weight.quant_state)


def _bytes(info: TensorInfo) -> int:
    bits = re.search(r"\d+", info.dtype)
    return math.prod(info.shape) * (8 if bits is None else int(bits[0])) // 8  # BOOL takes a byte
