"""Reads what a GGUF adapter has to know of its base model: the architecture, the tensors and the attention heads.

The base model is a GGUF file, or the directory of a model of transformers; of either only headers are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from ..disk.adapters.contents import PEFT_PREFIX
from ..disk.adapters.source import AdapterSource
from ..disk.checkpoints.checkpoint import Checkpoint
from ..disk.checkpoints.skeleton import Skeleton
from ..messages import first_few

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""By transformers' `model_type`, the architecture's name in GGUF."""
BY_SCRIPT = "Export the adapter in PEFT's format, and convert that by llama.cpp's convert_lora_to_gguf.py."
MERGED = (
    "Merge the adapter (wara-peft merge), and convert the merged model by llama.cpp's convert_hf_to_gguf.py; or train "
    "it without."
)


@dataclass(frozen=True)
class GgufBase:
    """The base model of a GGUF adapter.

    Attributes:
        path: the GGUF file, or the directory.
        architecture: the architecture's name in GGUF.
        blocks: number of its blocks.
        heads: numbers of heads by the weight whose rows they divide, "attn_q" or "attn_k".
        shapes: shape (out, in) of each matrix by its name in GGUF, such as "blk.0.attn_q.weight".
    """

    path: Path
    architecture: str
    blocks: int
    heads: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> GgufBase:
        """Read a base model's GGUF file, or the config and the headers in its directory.

        Raises:
            ImportError: the package gguf is not installed.
            FileNotFoundError: there is no such file or directory, or the directory is not a model's.
            ValueError: the architecture is none of `ARCHITECTURES`, or the file or the config cannot be used.
        """
        import_gguf()
        return _of_file(Path(path)) if Path(path).is_file() else _of_directory(Path(path))

    def tensor_names(self, source: AdapterSource) -> dict[str, str]:
        """Give the base's name of the weight that each adapted module changes, after a check that llama.cpp can.

        Raises:
            ValueError: the adapter holds what GGUF adapters do not, or the base lacks a weight or has it in another
                shape.
        """
        _check_loadable(source)
        names = weight_names(self.architecture, self.blocks, source.modules)
        lacking = {repr(name): tensor for name, tensor in names.items() if tensor not in self.shapes}
        if lacking:
            is_tied = "output.weight" in lacking.values()
            raise ValueError(
                f"The adapter changes {first_few(list(lacking))}, and the base {str(self.path)!r} has no such weights"
                f"{', as its head is tied to the input embedding' if is_tied else ''}. "
                f"{MERGED if is_tied else 'Give the base that it was trained on.'}"
            )
        found = {name: tensor for name, tensor in names.items() if tensor is not None}
        different = [
            f"{name!r} (there {shape.lengths}, here {self.shapes[found[name]]})"
            for name, shape in source.modules.items()
            if self.shapes[found[name]] != shape.lengths
        ]
        if different:
            raise ValueError(
                f"The adapter was trained on another base than {str(self.path)!r}: sizes (out, in) differ in "
                f"{first_few(different)}. Give the base that it was trained on."
            )
        return found


def weight_names(architecture: str, blocks: int, modules: Iterable[str]) -> dict[str, str | None]:
    """Give GGUF's name of each module's weight by the table of the package gguf; None if the table has none.

    A model without a head has names without "model." at the beginning, and GGUF has no such model.
    """
    gguf = import_gguf()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, blocks)
    found = {module: table.get_name(module) or table.get_name(f"model.{module}") for module in modules}
    return {module: None if name is None else f"{name}.weight" for module, name in found.items()}


def import_gguf() -> Any:
    """Import the package gguf, which no other file of this package does."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"format='gguf' needs the package gguf: pip install gguf ({error}).") from error
    return gguf


def _of_file(path: Path) -> GgufBase:
    try:
        reader = import_gguf().GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        architecture = fields["general.architecture"]
        _check_architecture(path, architecture, architecture in ARCHITECTURES.values())
        if fields.get("split.count", 1) > 1:
            raise ValueError("it is one of several parts; join them by llama-gguf-split --merge")
        heads = int(fields[f"{architecture}.attention.head_count"])
        return GgufBase(
            path,
            architecture,
            blocks=int(fields[f"{architecture}.block_count"]),
            heads={"attn_q": heads, "attn_k": int(fields.get(f"{architecture}.attention.head_count_kv", heads))},
            # GGUF counts dimensions from the innermost one.
            shapes={tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors},
        )
    except _UnknownArchitectureError:
        raise
    except Exception as error:  # the reader raises errors of many kinds at a file that is damaged or none of GGUF
        raise ValueError(f"Cannot use {str(path)!r} as a base model in GGUF: {error}.") from error


def _of_directory(path: Path) -> GgufBase:
    skeleton = Skeleton(Checkpoint(path))
    config = skeleton.config
    _check_architecture(path, config.model_type, config.model_type in ARCHITECTURES)
    architecture = ARCHITECTURES[config.model_type]
    # The sizes are those of the config's model: in a quantized checkpoint the tensors have others.
    classes: Any = AutoModelForCausalLM._model_mapping
    model = skeleton.make(classes[type(config)])
    weights = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = weight_names(architecture, config.num_hidden_layers, weights)
    shapes = {tensor: weights[name] for name, tensor in names.items() if tensor is not None}
    if config.tie_word_embeddings:
        del shapes["output.weight"]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return GgufBase(path, architecture, config.num_hidden_layers, heads, shapes)


class _UnknownArchitectureError(ValueError):
    """Raised when the base model is none of `ARCHITECTURES`."""


def _check_architecture(path: Path, name: Any, is_known: bool) -> None:
    if not is_known:
        raise _UnknownArchitectureError(
            f"{str(path)!r} is of the architecture {name!r}, and GGUF adapters are written for "
            f"{', '.join(ARCHITECTURES)}. {BY_SCRIPT}"
        )


def _check_loadable(source: AdapterSource) -> None:
    """Refuse an adapter of which llama.cpp would load nothing, or only a part."""
    # PEFT saves the frozen weight of a head beside its adapter, and the base has that weight.
    frozen = {f"{PEFT_PREFIX}{name}.base_layer.weight" for name in source.modules}
    others = [repr(key.removeprefix(PEFT_PREFIX)) for key in source.others if key not in frozen]
    if others:
        raise ValueError(f"A GGUF adapter holds LoRAs alone, and this one has {first_few(others)} in full. {MERGED}")
    kinds: dict[str, list[str]] = {}
    for name, shape in source.modules.items():
        if not shape.kind.is_linear or shape.kind.is_factorized:
            kinds.setdefault(shape.kind.name, []).append(repr(name))
    refused = [f"{kind} ({first_few(names)})" for kind, names in kinds.items()]
    if refused:
        raise ValueError(f"A GGUF adapter is one of linear layers alone, not of {' and '.join(refused)}. {MERGED}")
