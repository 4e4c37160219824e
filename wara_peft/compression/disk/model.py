"""Compressed models on disk: the files that transformers writes, and `compression.json` about the factorised layers.

The names and shapes of the tensors say which layers are factorised, and with which ranks. So a directory without the
JSON, which `Trainer` or `save_pretrained` wrote, can be loaded too. If the JSON is there, it must agree with the
tensors. No file is trusted: each is checked before its content is used.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...arguments import check_argument
from ...compiled import on_plain_model
from ...disk.checkpoints.checkpoint import Checkpoint, read_json
from ...disk.checkpoints.directory import written_at_once
from ...disk.checkpoints.skeleton import Skeleton, keys_of_parameters
from ...factorized import DenseSparseLinear, DictionaryLinear, LowRankPlusSparseLinear, SharedBaseLinear
from ...factorized.key_names import missing_names
from ...factorized.low_rank_plus_sparse_linear import check_places
from ...factorized.marks import quantization_of
from ...factorized.saved import FACTORIZED, kinds_and_sizes, name_tensors, put_in_place
from ...factorized.sparse_rows import unpack_bits
from ...messages import first_few
from ..report import CompressionReport

RECORD = "compression.json"
ADAPTER = "adapter_config.json"
VERSION = 1
SPARE_NUMBERS = 100_000_000
"""How many numbers a model may have beyond those in its files, in buffers such as tables of positions."""


@on_plain_model
def save_compressed(
    model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False, max_shard_size: str = "5GB"
) -> None:
    """Write a compressed model of transformers: safetensors, its config, and `compression.json`.

    Args:
        model: a model that `compress` or `factorize` has changed, or that `load_compressed` has loaded. It must have
            no adapters: merge them, or save them by themselves.
        path: directory to write; its files appear together, when all are complete.
        overwrite: replace `path` if it exists.
        max_shard_size: as in `save_pretrained`.

    Raises:
        TypeError: `model` is no model of transformers.
        ValueError: the model has no factorised layer, or has adapters; or `path` exists.
    """
    call = "save_compressed(model, path)"
    check_argument(call, "model", model, "an nn.Module")
    check_argument(call, "path", path, "a str or os.PathLike")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no PreTrainedModel. Save the state_dict of other models, and an adapter by "
            "its own save_pretrained."
        )
    adapted = [
        repr(name)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
    ]
    if adapted:
        raise ValueError(f"The model has adapters, in {first_few(adapted)}. Merge them, or save them by themselves.")
    with written_at_once(path, "replace" if overwrite else "refuse") as directory:
        write_compressed(model, directory, max_shard_size)


def write_compressed(model: PreTrainedModel, directory: Path, max_shard_size: str = "5GB") -> None:
    """Write the files of a compressed model into a directory, and read them back.

    Raises:
        ValueError: the model has no factorised layer, or its files do not hold what it has.
    """
    if not kinds_and_sizes(model):
        raise ValueError("The model has no factorised layer; compress it further, or use its save_pretrained.")
    cast(Any, model).save_pretrained(directory, max_shard_size=max_shard_size)
    write_record(model, directory)


def write_record(model: PreTrainedModel, directory: Path) -> None:
    """Write `compression.json` beside the other files of a compressed model, and read all of them back.

    Tensors of the model that are on the meta device are not compared with those in the files.

    Raises:
        ValueError: the files do not hold what the model has.
    """
    layers = kinds_and_sizes(model)
    report = getattr(model, "compression_report", None)
    record = {
        "version": VERSION,
        "layers": layers,
        "report": report.as_dict() if isinstance(report, CompressionReport) else None,
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _check_written(model, layers, directory)


def _check_written(model: PreTrainedModel, layers: dict[str, dict[str, object]], directory: Path) -> None:
    """Refuse files from which another model than this one would be loaded. One tensor is read at a time."""
    checkpoint = Checkpoint(directory)
    empty = Skeleton(checkpoint).make(type(model))
    found = kinds_and_sizes(empty)
    wrong = [name for name in {**layers, **found} if layers.get(name) != found.get(name)]
    state = model.state_dict()
    keys_of = keys_of_parameters(empty, checkpoint)
    for name, value in state.items():
        for key in keys_of.get(name, []):
            if not value.is_meta and not torch.equal(checkpoint.read(key), value.detach().cpu()):
                wrong.append(name)
    wrong += missing_names(model, state, keys_of)
    if wrong:
        raise ValueError(
            f"What transformers has written of {first_few([repr(name) for name in dict.fromkeys(wrong)])} is not what "
            f"the model has, so nothing is kept. Update transformers, or save the state_dict of the model."
        )


def load_compressed(
    path: str | os.PathLike[str], model_class: type[PreTrainedModel] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a compressed model that `save_compressed`, `Trainer` or `save_pretrained` has written.

    Args:
        path: the directory.
        model_class: the class of the model; None takes the class that the config names.
        kwargs: passed on to `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, …

    Returns:
        The model, in evaluation mode as `from_pretrained` leaves it, with its `compression_report` if that was saved.

    Raises:
        FileNotFoundError: the directory or a file is missing, or the weights are only there as pickles, which are not
            opened.
        ValueError: files are broken or incomplete or contradict each other; the config names no class of transformers,
            or describes a model far larger than its files; values of factors are not finite; or the directory holds
            an adapter.
    """
    check_argument("load_compressed(path)", "path", path, "a str or os.PathLike")
    base = Path(path)
    checkpoint = Checkpoint(base)
    if (base / ADAPTER).is_file():
        raise ValueError(f"{str(base)!r} holds {ADAPTER!r}: load an adapter onto its base model.")
    record = read_record(base)
    skeleton = Skeleton(checkpoint)
    chosen = model_class_of(skeleton) if model_class is None else model_class
    empty = skeleton.make(chosen)
    _check_record(base, record, kinds_and_sizes(empty))
    _check_fit(checkpoint, empty)
    shapes = skeleton.shapes

    # `from_pretrained` makes the model itself and then fills in tensors by name. With this subclass the factorised
    # layers are in place when it does so, and its own handling of dtypes, devices and shards serves them as well.
    class Factorised(chosen):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            put_in_place(self, shapes)

    # transformers looks up some things, such as conversions of weights, by the name of the class.
    Factorised.__name__, Factorised.__qualname__ = chosen.__name__, chosen.__qualname__
    Factorised.__module__ = chosen.__module__
    if kwargs.get("quantization_config") is not None and quantization_of(skeleton.config) is None:
        # Transformers takes one quantizer, and this subclass does what ours would do.
        kwargs["config"] = copy.deepcopy(kwargs.get("config", skeleton.config))
        vars(kwargs["config"]).pop("quantization_config", None)
    with skeleton.limited():
        model, info = Factorised.from_pretrained(
            base, output_loading_info=True, local_files_only=True, use_safetensors=True, **kwargs
        )
    for name, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, and its config does not ask for,")):
        if info[name]:
            keys = first_few([repr(str(key)) for key in sorted(info[name])])
            raise ValueError(f"{str(base)!r} {what} {keys}. Use a complete copy of the model.")
    # The subclass was only needed for loading. Saving, copying and `isinstance` see the model's own class.
    model.__class__ = chosen
    name_tensors(model)
    _check_values(base, model)
    report = _report_of(base, record)
    if report is not None:
        model.compression_report = report
    return cast(PreTrainedModel, model)


def read_record(base: Path) -> dict[str, Any] | None:
    """Give the content of `compression.json`, or None if there is no such file.

    Raises:
        ValueError: the file is not JSON, lacks its layers, or is of another version.
    """
    path = base / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("version") != VERSION or not isinstance(record.get("layers"), dict):
        raise ValueError(
            f"{str(path)!r} has version={record.get('version')!r}, and {VERSION} with layers can be read. Update "
            "wara-peft, or remove the file: the tensors alone tell of the layers."
        )
    return record


def saved_layers(base: Path) -> dict[str, dict[str, object]]:
    """Give kind and sizes of each factorised layer in a directory. Only headers of its tensor files are read.

    Raises:
        FileNotFoundError: the directory or a file is missing, or the weights are only there as pickles.
        ValueError: files are broken, or `compression.json` contradicts the tensors.
    """
    skeleton = Skeleton(Checkpoint(base))
    layers = kinds_and_sizes(skeleton.make(model_class_of(skeleton)))
    _check_record(base, read_record(base), layers)
    return layers


def saved_report(base: Path) -> CompressionReport | None:
    """Give the report that `compress` made for the model, if it was saved.

    Raises:
        ValueError: `compression.json` is broken.
    """
    return _report_of(base, read_record(base))


def _report_of(base: Path, record: dict[str, Any] | None) -> CompressionReport | None:
    fields = None if record is None else record.get("report")
    if fields is None:
        return None
    try:
        return CompressionReport.from_dict(fields)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{str(base / RECORD)!r} has a broken report: {type(error).__name__}: {error}") from error


def model_class_of(skeleton: Skeleton) -> type[PreTrainedModel]:
    """Give the class of transformers that a config names.

    Raises:
        ValueError: the config names no class, or none that transformers has.
    """
    # Only classes of transformers itself are taken: code beside a checkpoint is never run.
    names = skeleton.config.architectures or []
    for name in names if isinstance(names, list) else []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(f"{str(skeleton.path)!r} names no class of transformers: architectures={names!r}.")


def _check_fit(checkpoint: Checkpoint, empty: PreTrainedModel) -> None:
    """Refuse tensors of wrong shapes, and a model far larger than its files, before the model is allocated."""
    parameters = empty.state_dict()
    for name, keys in keys_of_parameters(empty, checkpoint).items():
        for key in keys if name in parameters else ():
            if checkpoint.tensors[key].shape != tuple(parameters[name].shape):
                raise ValueError(
                    f"{str(checkpoint.base)!r} has {key!r} of shape {checkpoint.tensors[key].shape}, where "
                    f"{type(empty).__name__} with its config has {tuple(parameters[name].shape)}."
                )
    # A short config can ask for any amount of memory, so its model is compared with what the files hold.
    there = sum(_numbers(info.shape) for info in checkpoint.tensors.values())
    wanted = _count([*empty.parameters(), *empty.buffers()])
    if wanted > 4 * there + SPARE_NUMBERS:
        raise ValueError(
            f"{str(checkpoint.base)!r} has a config of a model with {wanted:,} numbers, far more than the {there:,} "
            "in its files."
        )


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _numbers(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _check_record(base: Path, record: dict[str, Any] | None, found: dict[str, dict[str, object]]) -> None:
    if not found:
        raise ValueError(
            f"{str(base)!r} is a model without factorised layers, neither compressed nor an adapter; load it with "
            "from_pretrained."
        )
    layers = found if record is None else record["layers"]
    differ = [repr(name) for name in {**layers, **found} if layers.get(name) != found.get(name)]
    if differ:
        raise ValueError(
            f"{str(base / RECORD)!r} contradicts the tensors beside it, about {first_few(differ)}. Use a complete "
            "copy of the model."
        )


def _check_values(base: Path, model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if not isinstance(layer, FACTORIZED):
            continue
        for parameter in layer.parameters():
            if not parameter.is_meta and not bool(parameter.isfinite().all()):
                raise ValueError(f"{str(base)!r} is broken: {name!r} has values that are not finite.")
        if isinstance(layer, LowRankPlusSparseLinear) and not layer.indices.is_meta:
            try:
                check_places(name, layer.indices, layer.nonzeros, layer.in_features * layer.out_features)
            except ValueError as error:
                raise ValueError(f"{str(base)!r} is broken: {error}") from error
        if isinstance(layer, SharedBaseLinear) and not layer.support.is_meta:
            places = int(unpack_bits(layer.support, layer.columns).sum())
            if places != layer.places:
                raise ValueError(
                    f"{str(base)!r} is broken: the support of {name!r} has {places} places for {layer.places} values."
                )
        if isinstance(layer, (DictionaryLinear, DenseSparseLinear)) and not layer.support.is_meta:
            counts = unpack_bits(layer.support, layer.support.shape[1] * 8).sum(1)
            within = unpack_bits(layer.support, layer.atoms).sum(1)
            if not bool((counts == layer.nonzeros).all()) or not torch.equal(counts, within):
                raise ValueError(
                    f"{str(base)!r} is broken: the support of {name!r} does not have {layer.nonzeros} of "
                    f"{layer.atoms} places in each row."
                )
