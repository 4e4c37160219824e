"""Reads checkpoints that bitsandbytes quantized, or would quantize, as the dense weights that theirs stand for."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ...base_layers.kinds import known_kind
from ...factorized.marks import METHOD
from ...messages import first_few
from .checkpoint import Checkpoint, read_json
from .quantized_weights import (
    DTYPES,
    STATE,
    dense_shape,
    dequantized,
    descriptions,
    rounded,
    size_in_bytes,
    state_of,
)
from .skeleton import keys_of_parameters
from .tensors import FLOATS, TensorInfo

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""By the name of a quantization, the arguments of transformers' `BitsAndBytesConfig`."""
SHARD_BYTES = 5 * 10**9
"""Dense weights of one file that take more than this are written to several files."""
_INSTALL = "bitsandbytes, which reads and rounds quantized weights, is missing: pip install 'wara-peft[quant]'."


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
            import bitsandbytes.functional  # noqa: F401
        except ImportError as error:
            raise ImportError(_INSTALL) from error
        super().__init__(base)
        self.quantization = quantization
        fields = read_json(base / CONFIG_NAME) if (base / CONFIG_NAME).is_file() else {}
        is_marked = self._check_method(fields.get("quantization_config"))
        self._read_from = dict(self.file_of)
        # By the key of each weight that is stored quantized, the keys of the tensors that describe it, by their names.
        self._descriptions = descriptions(self.tensors.keys())
        # By the key of each weight that is to be rounded, its parameter in the quantized model, on the meta device.
        self._rounded: dict[str, Any] = {}
        self._turned: set[str] = set()
        self._check_is_quantized(is_marked)
        for key in {key for description in self._descriptions.values() for key in description.values()}:
            del self.file_of[key], self.tensors[key]
        self._dtype = self._dtype_on_loading(fields)
        shapes = {key: self._dense_shape(key) for key in self._descriptions}
        self.tensors.update({key: TensorInfo(shape, self._dtype) for key, shape in shapes.items()})
        self._check_others()
        if quantization is None:
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
        if isinstance(named, str) and named.removeprefix("torch.") in DTYPES:
            return DTYPES[named.removeprefix("torch.")]
        others = (info.dtype for key, info in self.tensors.items() if key not in self._descriptions)
        return next((dtype for dtype in others if dtype in FLOATS), "F16")

    def _dense_shape(self, key: str) -> tuple[int, ...]:
        parts = self._descriptions[key]
        try:
            texts = [self._stored(part) for name, part in parts.items() if name.startswith(STATE)]
            headers = {name: self._header(part) for name, part in parts.items()}
            return dense_shape(self._header(key), headers, state_of(texts[0]) if texts else None)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"Cannot dequantize {key!r} in {str(self.base)!r}: the tensors that bitsandbytes writes for it are "
                f"damaged or incomplete ({type(error).__name__}: {error}). Use a complete copy."
            ) from error

    def _header(self, key: str) -> Any:
        """Shape and dtype of a tensor in the files, also of one that `tensors` has as dense or leaves out; or None."""
        return self._opened[self._read_from[key]].tensors[key] if key in self._read_from else None

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
            size = size_in_bytes(self.tensors[key])
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
        weight, is_turned = self._stored(key), key in self._turned
        if key in self._descriptions:
            parts = {name: self._stored(part) for name, part in self._descriptions[key].items()}
            weight = dequantized(weight, parts)
        elif key in self._rounded:
            weight = weight.to(FLOATS[self._dtype])
            weight = rounded(weight.T if is_turned else weight, self._rounded[key])
        else:
            return weight
        return weight.T if is_turned else weight

    def _stored(self, key: str) -> Tensor:
        (tensor,) = self._opened[self._read_from[key]].read([key])
        return tensor
