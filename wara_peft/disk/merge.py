"""Merging a saved adapter into a checkpoint on disk, shard by shard, for models larger than memory."""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import CONFIG_NAME

from ..messages import first
from .adapter import SavedAdapter, Track, untracked
from .checkpoint import Checkpoint, ShardWriter, copy_beside, read_json
from .directory import written_at_once

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class with which PEFT's `AutoPeftModel...` loads the base of an adapter of each task type."""


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    track: Track = untracked,
) -> None:
    """Write a plain transformers checkpoint in which W + ΔW stands for each adapted weight W.

    Each sum is made in float32 or better and rounded once, as in `merge_and_unload`. At any time about one shard and
    one layer's ΔW are in memory. Files are as in the base: the same shards and keys, with modules that the adapter
    trained in full, biases and tokens in their places; config, tokenizer and generation settings are copied.
    Parameters that the base's checkpoint lacks, such as a new classification head, go into its last shard.

    Args:
        base: directory of the base model, with safetensors, as `save_pretrained` writes it.
        adapter: directory of the saved adapter.
        path: directory to write; it appears when it is complete.
        dtype: dtype of all floating-point tensors; None keeps each one's.
        device: where ΔW and the sums are computed.
        overwrite: replace `path` if it is there.
        track: wraps the loop over all tensors, to show progress.

    Raises:
        FileNotFoundError: a directory or file is missing, or there are only pickles, which are not opened.
        ValueError: the adapter does not fit the base, a target's weight is converted or fused on loading, tied to
            another, quantized or not in the checkpoint, or a merged weight is not finite. Nothing is written then.
    """
    checkpoint, saved = Checkpoint(Path(base)), SavedAdapter(adapter)
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


@dataclass(frozen=True)
class _Change:
    """What happens to one parameter: a tensor of the adapter replaces it, ΔW of an adapted module is added, or both.

    Attributes:
        parameter: its name in the model.
        module: the adapted module.
        other: the adapter's key of a tensor in full, or of the rows of single tokens.
    """

    parameter: str
    module: str | None = None
    other: str = ""

    @property
    def of_tokens(self) -> bool:
        return self.other.endswith(f".{TOKENS}")


PEFT_INTERNAL = re.compile(r"\.(modules_to_save|original_module)\.")
"""In keys that PEFT saves twice with `bias="all"`: the biases of a module that is trained in full."""
TOKENS = "trainable_tokens_delta"
"""PEFT's name for the rows of `trainable_token_indices`."""


class _Plan:
    """Which tensors of a checkpoint an adapter changes, found and checked before anything is written.

    Attributes:
        model: the model, without its weights, whose parameters the adapter names.
        changes: by the checkpoint's key what happens to its tensor.
        added: what happens to parameters that the checkpoint lacks.
    """

    def __init__(self, checkpoint: Checkpoint, saved: SavedAdapter) -> None:
        self.checkpoint, self.saved = checkpoint, saved
        for name in saved.modules:
            saved.check_has_delta_weight(name)
        others = {_parameter_of(key): key for key in saved.others if not PEFT_INTERNAL.search(key)}
        modules = {f"{name}.weight": name for name in saved.modules}
        changes = [_Change(name, modules.get(name), others.get(name, "")) for name in {**modules, **others}]
        self.model = empty_model(checkpoint.base, saved, {change.parameter: change.other for change in changes})
        self.parameters = self.model.state_dict()
        self.changes: dict[str, _Change] = {}
        self.added: list[_Change] = []
        keys_of = self._keys_of_parameters()
        for change in self._once_for_tied(changes):
            self._place(change, [keys_of.get(name, []) for name in self._tied_to(change.parameter)])

    def _place(self, change: _Change, keys_by_parameter: list[list[str]]) -> None:
        keys = [key for keys in keys_by_parameter for key in keys]
        if max(map(len, keys_by_parameter)) > 1 or (change.module is not None and not keys):
            raise ValueError(
                f"Cannot merge into {change.parameter!r}: {str(self.checkpoint.base)!r} has {len(keys)} tensors that "
                f"{type(self.model).__name__} loads as this weight and no other. It may be fused, converted or "
                "renamed on loading; load the model and use `merge_and_unload`."
            )
        if not keys:
            self._check_shape(change, tuple(self.parameters[change.parameter].shape))
            self.added.append(change)
        for key in keys:
            self._check_shape(change, self.checkpoint.shapes[key])
            self.changes[key] = change

    def _keys_of_parameters(self) -> dict[str, list[str]]:
        """The keys of the checkpoint that transformers loads, without conversion, as each parameter."""
        mapping = get_model_conversion_mapping(self.model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        keys_of: dict[str, list[str]] = {}
        for key in self.checkpoint.file_of:
            name, converted = rename_source_key(
                key, renamings, converters, self.model.base_model_prefix, self.parameters
            )
            if converted is None:
                keys_of.setdefault(name, []).append(key)
        return keys_of

    def _tied_to(self, parameter: str) -> list[str]:
        """The parameters that share one weight with this one, itself included."""
        ties = self.model.all_tied_weights_keys  # from each tied parameter's name to that of its source
        source = ties.get(parameter, parameter)
        return [source, *(name for name, other in ties.items() if other == source)]

    def _once_for_tied(self, changes: list[_Change]) -> list[_Change]:
        """One change for each weight; refused if it is tied to a weight that the adapter does not mean."""
        by_parameter = {change.parameter: change for change in changes}
        for change in changes:
            tied = self._tied_to(change.parameter)
            meant = self.saved.config.ensure_weight_tying or change.of_tokens
            if len(tied) > 1 and not meant and not self._same([by_parameter.get(name) for name in tied]):
                others = [repr(name) for name in tied if name != change.parameter]
                raise ValueError(
                    f"Cannot merge into {change.parameter!r}: its weight is tied to {first(others)}, which would "
                    "change too. Untie them in the base model (`tie_word_embeddings=False`), or train the adapter "
                    "with `ensure_weight_tying=True`."
                )
        return [
            change
            for change in changes
            if not any(
                name in by_parameter for name in self._tied_to(change.parameter)[:1] if name != change.parameter
            )
        ]

    def _same(self, changes: list[_Change | None]) -> bool:
        """Whether all of these put one and the same tensor in full."""
        keys = [change.other for change in changes if change is not None and change.other]
        return len(keys) == len(changes) and all(
            torch.equal(self.saved.other(key), self.saved.other(keys[0])) for key in keys
        )

    def _check_shape(self, change: _Change, found: tuple[int, ...]) -> None:
        expected = [] if change.module is None else [self.saved.weight_shape(change.module)]
        if change.of_tokens:
            rows, *others = self.saved.others[change.other]
            self._check_tokens(change, found[0], rows)
            expected.append((found[0], *others))
        elif change.other:
            expected.append(self.saved.others[change.other])
        if any(shape != found for shape in expected):
            raise ValueError(
                f"{change.parameter!r} has the shape {found} in {str(self.checkpoint.base)!r}, and {expected[-1]} in "
                "the adapter, which was trained on another base model, or on this one with another head or vocabulary."
            )

    def _check_tokens(self, change: _Change, vocabulary: int, saved_rows: int) -> None:
        rows = self._token_rows(change)
        if len(rows) != saved_rows or not all(0 <= row < vocabulary for row in rows):
            raise ValueError(
                f"trainable_token_indices of the adapter do not fit {change.parameter!r}, with {vocabulary} tokens, "
                f"and its {saved_rows} saved rows."
            )

    def _token_rows(self, change: _Change) -> list[int]:
        indices = self.saved.config.trainable_token_indices
        if isinstance(indices, dict):
            module = change.parameter.rpartition(".")[0]
            return next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), [])
        return indices or []

    def merged(self, key: str, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
        """The tensor to write for a key of the checkpoint, in `dtype` if it is a floating-point one."""
        tensor = self.checkpoint.read(key)
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        change = self.changes.get(key)
        if change is None:
            return tensor.to(target)
        if change.other:
            new = self.saved.other(change.other).to(tensor.dtype)
            rows = torch.tensor(self._token_rows(change)) if change.of_tokens else None
            tensor = new if rows is None else tensor.index_copy(0, rows, new)
        return tensor.to(target) if change.module is None else self._sum(tensor, change.module, device, target)

    def _sum(self, weight: Tensor, module: str, device: str | torch.device, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self.saved.update(module, wide, device).dense()
        merged = delta.add_(weight.to(device, wide)).to("cpu", dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"Merging into {module!r} gives values that are not finite in {dtype}.")
        return merged

    def new_tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """What the checkpoint lacks, by the model's own names."""
        tensors = {change.parameter: self.saved.other(change.other) for change in self.added}
        return {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}


def empty_model(base: Path, saved: SavedAdapter, parameters: dict[str, str]) -> PreTrainedModel:
    """The model that an adapter was trained on, built from the base's config on the meta device.

    Its class is the one that the adapter's config names or its task type stands for, or else the base's own.

    Args:
        base: directory of the base model.
        saved: the adapter.
        parameters: names that the model must have, and for what the adapter holds in full its key.

    Raises:
        FileNotFoundError: the base has no config.
        ValueError: its config cannot be used, or no class has parameters of these names.
    """
    if not (base / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"There is no file {str(base / CONFIG_NAME)!r}.")
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise ValueError(f"Cannot use {str(base / CONFIG_NAME)!r}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{str(base)!r} is quantized. Merge into the model it was made from, and quantize the result."
        )
    problems = []
    for model_class in _model_classes(config, saved):
        model = _on_meta(model_class, config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        missing = [repr(name) for name in parameters if name not in shapes]
        if not missing:
            labels = _labels(saved, parameters, shapes)
            if labels is None:
                return model
            config.num_labels = labels
            return _on_meta(model_class, config)
        problems.append(f"{model_class.__name__} has no {first(missing)}")
    reason = "; ".join(problems) or "its config names no class of transformers"
    raise ValueError(f"The adapter does not fit {str(base)!r}: {reason}.")


def _on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _model_classes(config: PreTrainedConfig, saved: SavedAdapter) -> list[type[PreTrainedModel]]:
    names = [(saved.config.auto_mapping or {}).get("base_model_class"), *(config.architectures or [])]
    found = [getattr(transformers, str(name), None) for name in names]
    auto_class = AUTO_CLASSES.get(str(saved.config.task_type))
    if auto_class is not None:
        found.insert(0, getattr(transformers, auto_class)._model_mapping.get(type(config), None))
    classes = [entry for entry in found if isinstance(entry, type) and issubclass(entry, PreTrainedModel)]
    return [entry for entry in dict.fromkeys(classes) if isinstance(config, entry.config_class or PreTrainedConfig)]


def _labels(saved: SavedAdapter, parameters: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Number of labels for which the adapter has trained a head in full, if that is not the base config's."""
    if saved.config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = {
        saved.others[key][0]
        for name, key in parameters.items()
        if key and saved.others[key][1:] == shapes[name][1:] and saved.others[key] != shapes[name]
    }
    return heads.pop() if len(heads) == 1 else None


def _parameter_of(key: str) -> str:
    """The model's name for what an adapter holds in full."""
    return key.replace(".base_layer.", ".").replace(f".token_adapter.{TOKENS}", ".weight")


def _write_config(base: Path, directory: Path, plan: _Plan, dtype: torch.dtype | None) -> None:
    """Change in the copied config what the merge has changed."""
    config = read_json(base / CONFIG_NAME)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.added:
        config["architectures"] = [type(plan.model).__name__]
        labels = {"id2label": plan.model.config.id2label, "label2id": plan.model.config.label2id}
        config.update(labels if plan.saved.config.task_type in ("SEQ_CLS", "TOKEN_CLS") else {})
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
