"""Merges a saved adapter into its base model's checkpoint on disk, shard by shard, for models larger than memory."""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch import Tensor
from transformers.utils import CONFIG_NAME

from ...base_layers.kinds import known_kind
from ...base_layers.tied_weights import names_by_parameter
from ...layers.mergeable import check_mergeable
from ...messages import first_few
from ..checkpoints.checkpoint import Checkpoint, ShardWriter, copy_beside, read_json
from ..checkpoints.dequantized import DequantizedCheckpoint
from ..checkpoints.directory import written_at_once
from ..checkpoints.skeleton import keys_of_parameters
from ..checkpoints.tensors import FLOATS, INTEGERS, TensorInfo
from .adapter import SavedAdapter, Track, no_progress_bar
from .base_model import AdaptedModel, empty_model, is_name_of_embedding
from .contents import PEFT_INTERNAL, TOKENS, parameter_of


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    dequantize: bool = False,
    quantization: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    track: Track = no_progress_bar,
) -> None:
    """Write a plain transformers checkpoint in which each adapted weight W is replaced by W + ΔW.

    Each sum is computed in float32 or better and rounded once, as `merge_and_unload` does. At any time about one shard
    and one layer's ΔW are in memory. The new checkpoint has the same shards and keys as the base; with `dequantize`
    large shards are divided, and tensors that only described quantized weights are left out. Modules that the adapter
    trained in full, biases and tokens replace the base's values. Config, tokenizer and generation settings are copied.
    Parameters that the base's checkpoint lacks, such as a new classification head, go into the last shard.

    Args:
        base: directory of the base model with safetensors files, as `save_pretrained` writes it.
        adapter: directory of the saved adapter.
        path: directory to write; it is empty until it is complete.
        dequantize: whether the adapter was trained beside quantized weights. Then ΔW is added to the dense weights
            that the quantized ones stand for, and all other quantized weights are written as such dense weights too.
            The base is a checkpoint that bitsandbytes quantized, or the dense one together with `quantization`.
        quantization: how the base was quantized when the adapter was trained: "nf4", "nf4-double" (with double
            quantization) or "int8". Each layer that transformers quantizes on loading is rounded as bitsandbytes
            rounds it, in the dtype that `from_pretrained` loads the base in by itself.
        dtype: dtype of all floating-point tensors; None keeps the dtype of each tensor. A quantized weight gets the
            dtype that the base's config names.
        device: where ΔW and the sums are computed.
        overwrite: replace `path` if it is there.
        track: wraps the loop over all tensors, to show progress.

    Raises:
        FileNotFoundError: a directory or file is missing, or there are only pickles, which are not opened.
        ImportError: `dequantize` needs bitsandbytes, which is missing.
        ValueError: the adapter does not fit the base; or a target's weight is converted or fused on loading, is tied
            to a weight that the adapter does not change in the same way, is quantized (without `dequantize`), or is
            not in the checkpoint; or a value is not finite in its dtype; or `dequantize` and `quantization` do not fit
            the base. Nothing is written then.
    """
    if quantization is not None and not dequantize:
        raise ValueError(
            f"quantization={quantization!r} says beside which weights the adapter was trained, and needs "
            "dequantize=True (on the command line --dequantize); the merged weights are not quantized."
        )
    _check_order(Path(base), Path(adapter))
    # All checks come before the directory is made: `_Plan` reads headers and configs, but no weights of the base.
    checkpoint = DequantizedCheckpoint(Path(base), quantization) if dequantize else Checkpoint(Path(base))
    saved = SavedAdapter(adapter)
    plan = _Plan(checkpoint, saved)
    with written_at_once(path, "replace" if overwrite else "refuse", inputs=(base, adapter)) as directory:
        writer = ShardWriter(directory)
        for key in track(checkpoint.file_of):
            writer.add(checkpoint.file_of[key], key, plan.merged(key, device, dtype))
        for key, tensor in plan.new_tensors(dtype).items():
            writer.add(writer.file, key, tensor)
        writer.finish()
        copy_beside(checkpoint.base, directory)
        _write_config(checkpoint.base, directory, plan, dtype)


def _check_order(base: Path, adapter: Path) -> None:
    """Refuse the two directories if they were given in the wrong order."""
    holds = [{name for name in (CONFIG_NAME, ADAPTER_CONFIG) if (path / name).is_file()} for path in (base, adapter)]
    if holds == [{ADAPTER_CONFIG}, {CONFIG_NAME}]:
        raise ValueError(
            f"{str(base)!r} is an adapter, and {str(adapter)!r} a model. Give the base model first, then the adapter."
        )


@dataclass(frozen=True)
class _Change:
    """What a merge does to one parameter: it puts new values, then new rows of tokens, then adds ΔW.

    At least one of these three happens.

    Attributes:
        parameter: the parameter's name in the model.
        module: the adapted module whose ΔW is added, or None.
        values: the adapter's key of the tensor with the new values, or "".
        rows: the adapter's key of the tensor with the new rows, or "".
    """

    parameter: str
    module: str | None = None
    values: str = ""
    rows: str = ""


class _Plan:
    """The changes that a merge makes to a checkpoint's tensors, all checked before anything is written.

    Attributes:
        model: the model that the adapter was trained on, without its weights.
        changes: the change of each tensor that changes, by its key in the checkpoint.
        added: the changes that put values into parameters which the checkpoint lacks.
    """

    def __init__(self, checkpoint: Checkpoint, saved: SavedAdapter) -> None:
        self.checkpoint, self.saved = checkpoint, saved
        for name in saved.modules:
            saved.check_has_delta_weight(name)
        factorized = [repr(name) for name, shape in saved.modules.items() if shape.kind.is_factorized]
        if factorized:
            raise ValueError(
                f"The adapter in {str(saved.path)!r} was trained beside factorised layers, such as "
                f"{first_few(factorized)}, and the base's are dense. Load the compressed model and the adapter, and "
                "call merge_and_unload."
            )
        changes = self._changes_by_parameter()
        # The class of the model is found by these names: the first class that has all of them.
        needed = {name: change.values for name, change in changes.items() if not self._may_be_missing(change)}
        self.model = empty_model(checkpoint, saved, needed)
        if isinstance(checkpoint, DequantizedCheckpoint):
            checkpoint.prepare(self.model)
        self.parameters = self.model.state_dict()
        # By a parameter's name, all names of it in the model: more than one if its weight is tied.
        self._tied = {
            name: names for names in names_by_parameter(self.model, in_every_place=True).values() for name in names
        }
        self.adapted = AdaptedModel(self.model, saved)
        lacking = [repr(name) for name in sorted(self.adapted.saved - changes.keys())]
        if lacking:
            raise ValueError(
                f"The adapter in {str(saved.path)!r} lacks {first_few(lacking)}, which its config promises for "
                f"{type(self.model).__name__}. Use a complete copy of the adapter."
            )
        missing = [repr(name) for name in changes if name not in self.parameters]
        if missing:
            warnings.warn(f"{type(self.model).__name__} has no {first_few(missing)}, which is left out, as by PEFT.")
        for name, shape in saved.modules.items():
            if not shape.kind.is_parameter and shape.parameter_of(name) in self.parameters:
                check_mergeable(name, self.model.get_submodule(name))
        self._turned = {name for name in saved.modules if self._is_turned(name)}
        self.changes: dict[str, _Change] = {}
        self.added: list[_Change] = []
        keys_of = keys_of_parameters(self.model, checkpoint)
        for change in self._once_for_tied([change for name, change in changes.items() if name in self.parameters]):
            self._place(change, [keys_of.get(name, []) for name in self._tied_to(change.parameter)])

    def _is_turned(self, name: str) -> bool:
        """Whether the model keeps an adapted weight transposed.

        bitsandbytes has no layer that keeps its weight as (in, out). So an adapter that was trained on a quantized
        GPT-2 is one of linear layers, and GPT-2 itself has `Conv1D` layers.
        """
        shape = self.saved.modules[name]
        if shape.kind.is_parameter or shape.parameter_of(name) not in self.parameters:
            return False
        own = known_kind(self.model.get_submodule(name))
        if own is None or not (own.is_linear and shape.kind.is_linear):
            return False
        return own.keeps_in_first != shape.kind.keeps_in_first

    def _changes_by_parameter(self) -> dict[str, _Change]:
        """Collect all that the adapter's file does to each parameter, by the parameter's name."""
        parameters = {name: shape.parameter_of(name) for name, shape in self.saved.modules.items()}
        changes = {parameter: _Change(parameter, name) for name, parameter in parameters.items()}
        for key in self.saved.others:
            if not PEFT_INTERNAL.search(key):
                name = parameter_of(key)
                part = {"rows" if key.endswith(f".{TOKENS}") else "values": key}
                changes[name] = replace(changes.get(name, _Change(name)), **part)
        return changes

    def _may_be_missing(self, change: _Change) -> bool:
        """Whether the model may lack the parameter, because the adapter's config mentions nothing that changes it.

        PEFT ignores such values when it loads them into a model without that parameter.
        """
        return change.values in self.saved.unmentioned and change.module is None and not change.rows

    def _place(self, change: _Change, keys_by_parameter: list[list[str]]) -> None:
        """Record a change under the checkpoint's keys of its weight, or as an addition if there are none.

        Args:
            change: the change of one weight.
            keys_by_parameter: for each of the weight's names in the model, the keys that transformers loads as it.
        """
        keys = [key for keys in keys_by_parameter for key in keys]
        needs_weight = change.module is not None or bool(change.rows and not change.values)
        if max(map(len, keys_by_parameter)) > 1 or (needs_weight and not keys):
            raise ValueError(
                f"Cannot merge into {change.parameter!r}: {str(self.checkpoint.base)!r} has {len(keys)} tensors that "
                f"{type(self.model).__name__} loads as this weight and no other. It may be fused, converted or "
                "renamed on loading; load the model and use `merge_and_unload`."
            )
        if not keys:
            # The dtype "" stands for any: the adapter's tensor is written in its own dtype.
            self._check_fit(change, TensorInfo(tuple(self.parameters[change.parameter].shape), ""))
            self.added.append(change)
        for key in keys:
            self._check_fit(change, self.checkpoint.tensors[key])
            self.changes[key] = change

    def _tied_to(self, parameter: str) -> list[str]:
        """The names of all parameters that share one weight with this parameter, its own name included."""
        return self._tied.get(parameter, [parameter])

    def _once_for_tied(self, changes: list[_Change]) -> list[_Change]:
        """Join the changes of tied parameters, so that each weight has one change.

        In an unmerged model PEFT can adapt one of two tied layers and leave the other. One merged weight cannot do
        that, so changes that differ between tied parameters are refused.
        """
        by_parameter = {change.parameter: change for change in changes}
        chosen = {}
        for change in changes:
            tied = self._tied_to(change.parameter)
            together = [by_parameter[name] for name in tied if name in by_parameter]
            changed_alone = [name for name in tied if name not in self.adapted.owned]
            if any(item.parameter in self.adapted.owned for item in together) and changed_alone:
                others = [repr(name) for name in changed_alone]
                raise ValueError(
                    f"Cannot merge into {change.parameter!r}: its weight is tied to {first_few(others)}, which would "
                    f"change too, and does not where the adapter is not merged. {self._remedy(changed_alone)}"
                )
            if len(together) > 1 and not self._alike(together):
                others = [repr(item.parameter) for item in together if item is not change]
                raise ValueError(
                    f"Cannot merge into {change.parameter!r}: its weight is tied to {first_few(others)}, which the "
                    "adapter changes otherwise. Untie them in the base model (`tie_word_embeddings=False`)."
                )
            chosen[tied[0]] = functools.reduce(_joined, together)
        return list(chosen.values())

    def _remedy(self, tied: list[str]) -> str:
        """Say what a user can do about tied parameters that only partly change."""
        untie = "Untie them in the base model (`tie_word_embeddings=False`)"
        # `ensure_weight_tying` has an effect only if PEFT knows a tied layer's name as an embedding's.
        peft_ties = any(is_name_of_embedding(name.rpartition(".")[0]) for name in tied)
        if self.saved.config.ensure_weight_tying or not peft_ties:
            return f"{untie}."
        return f"{untie}, or train the adapter with `ensure_weight_tying=True`."

    def _alike(self, changes: list[_Change]) -> bool:
        """Whether changes of tied parameters can be joined: at most one has a ΔW, and values and rows are equal."""
        values = [change.values for change in changes if change.values]
        rows = [change.rows for change in changes if change.rows]
        return (
            sum(change.module is not None for change in changes) <= 1
            and all(self.saved.token_indices(key) == self.saved.token_indices(rows[0]) for key in rows)
            and all(self._equal(keys) for keys in (values, rows))
        )

    def _equal(self, keys: list[str]) -> bool:
        return len(keys) < 2 or all(torch.equal(self.saved.other(key), self.saved.other(keys[0])) for key in keys[1:])

    def _check_fit(self, change: _Change, found: TensorInfo) -> None:
        """Check the shape and dtype of the checkpoint's tensor against all that the change puts into it."""
        expected = []
        if change.module is not None:
            shape = self.saved.weight_shape(change.module)
            expected.append(shape[::-1] if change.module in self._turned else shape)
        if change.values:
            expected.append(self.saved.others[change.values].shape)
        if change.rows:
            vocabulary = found.shape[0] if found.shape else 0
            self._check_tokens(change, vocabulary)
            expected.append((vocabulary, *self.saved.others[change.rows].shape[1:]))
        other = next((shape for shape in expected if shape != found.shape), None)
        if other is not None:
            raise ValueError(
                f"{change.parameter!r} has the shape {found.shape} in {str(self.checkpoint.base)!r}, and "
                f"{other} in the adapter, which was trained on another base model, or on this one with another "
                "head or vocabulary. Merge into the base model that it was trained on, resized as it was then."
            )
        counts = bool(change.values) and self.saved.others[change.values].dtype in INTEGERS
        if found.dtype and found.dtype not in (INTEGERS if counts else FLOATS):
            raise ValueError(
                f"{change.parameter!r} is of dtype {found.dtype} in {str(self.checkpoint.base)!r}: it is "
                "quantized, or not a weight. Merge into the model it was made from, and quantize the result."
            )

    def _check_tokens(self, change: _Change, vocabulary: int) -> None:
        if not all(0 <= row < vocabulary for row in self.saved.token_indices(change.rows)):
            raise ValueError(
                f"trainable_token_indices of the adapter do not fit {change.parameter!r}, with {vocabulary} tokens."
            )

    def merged(self, key: str, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
        """The tensor to write for a key of the checkpoint; `dtype` applies to it if it is a floating-point tensor."""
        tensor = self.checkpoint.read(key)
        # A dequantized weight may be read in a wider dtype than it is written in.
        own = FLOATS.get(self.checkpoint.tensors[key].dtype, tensor.dtype)
        new = dtype if dtype is not None and own.is_floating_point else own
        if own not in FLOATS.values() and new != own:
            raise ValueError(
                f"{key!r} is of dtype {own} in {str(self.checkpoint.base)!r}: it is quantized, and cannot be made "
                f"{new}."
            )
        change = self.changes.get(key)
        if change is None:
            return _rounded(key, tensor, new)
        if change.values:
            tensor = self.saved.other(change.values).to(tensor.dtype)
        if change.rows:
            rows = torch.tensor(self.saved.token_indices(change.rows), device="cpu")
            tensor = tensor.index_copy(0, rows, self.saved.other(change.rows).to(tensor.dtype))
        if change.module is not None:
            # ΔW and the sum are computed in float32 at least, so only the result is rounded to the weight's dtype.
            wide = torch.promote_types(own, torch.float32)
            delta = self.saved.update(change.module, wide, device).dense()
            delta = delta.T if change.module in self._turned else delta
            tensor = delta.add_(tensor.to(device, wide))
        return _rounded(change.parameter, _finite(change.parameter, tensor), new).cpu()

    def new_tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The tensors to write that the checkpoint lacks, by the model's names of them."""
        tensors = {change.parameter: self.saved.other(change.values) for change in self.added}
        return {
            name: _rounded(name, tensor, dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }


def _joined(one: _Change, other: _Change) -> _Change:
    """One change with all that two changes of a weight do; at most one of them has a ΔW."""
    if other.module is not None:
        one, other = other, one
    return replace(one, values=one.values or other.values, rows=one.rows or other.rows)


def _finite(parameter: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"Merging into {parameter!r} gives values that are not finite in {tensor.dtype}.")
    return tensor


def _rounded(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to a dtype.

    Raises:
        ValueError: a finite value is too large for the dtype.
    """
    rounded = tensor.to(dtype)
    if dtype != tensor.dtype and not torch.equal(rounded.isfinite(), tensor.isfinite()):
        raise ValueError(f"{key!r} gives values that are not finite in {dtype}. Give a wider dtype.")
    return rounded


def _write_config(base: Path, directory: Path, plan: _Plan, dtype: torch.dtype | None) -> None:
    """Write the base's config with the dtype, and the class and labels of a new head, that the merge has changed."""
    config = read_json(base / CONFIG_NAME)
    if isinstance(plan.checkpoint, DequantizedCheckpoint):
        config.pop("quantization_config", None)
    if dtype is not None:
        config.pop("torch_dtype", None)  # the name of `dtype` in configs that an older transformers wrote
        config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.added:
        config["architectures"] = [type(plan.model).__name__]
        labels = {"id2label": plan.model.config.id2label, "label2id": plan.model.config.label2id}
        config.update(labels if plan.saved.config.task_type in ("SEQ_CLS", "TOKEN_CLS") else {})
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
