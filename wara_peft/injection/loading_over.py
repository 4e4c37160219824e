"""Checks that the tensors of a saved adapter mean the same in the adapter of the model which they are to overwrite."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn

from ..config import WaRAConfig, scaling
from ..disk.adapters.contents import PEFT_PREFIX
from ..layers.lookup import fields_in_model, is_of_a_factor, layers_of, wara_config
from ..messages import first_few
from ..wavelet import filters
from .expected_file import AwaitedAdapter

MEANING = ("form", "levels", "grid_pairs", "core", "save_basis")
"""Fields on which the meaning of an adapter's tensors depends."""
MEANING_IF_SET = ("grid_size", "num_prefix_tokens")
"""Fields on which it depends too, compared only if both adapters set them; with None they come from the model."""
IN_FULL = ("bias", "modules_to_save", "trainable_token_indices")
"""Fields that determine which tensors of the base model an adapter trains, and so which ones its file holds."""


def check_saved_adapter(
    model: nn.Module, adapter_name: str, path: str | os.PathLike[str], *, warned: bool = False, **hub: Any
) -> None:
    """Compare a saved adapter with the adapter in the model that is to get its tensors.

    PEFT itself does not compare the configs. If the model already has an adapter of the name, `load_adapter` does not
    read the saved config; this happens when `Trainer` resumes or loads its best checkpoint. Neither does
    `PeftModel.from_pretrained(..., config=...)`.

    Args:
        model: the model with the adapter.
        adapter_name: the adapter's name.
        path: path or repository of the saved adapter, as `load_adapter` takes it.
        warned: whether the saved config was read before, so that its warnings need not be repeated.
        hub: arguments of `load_adapter` for the hub, such as `subfolder`.

    Raises:
        ValueError: the saved adapter is of another method, or the same tensors would compute something else in it.
    """
    saved = _saved_config(path, hub, warned)
    if saved is None:
        return
    way_out = (
        "Load it under another name, or into a model with the config that it was saved with "
        f"(`WaRAConfig.from_pretrained({str(path)!r})`)."
    )
    start = f"The adapter in {str(path)!r} cannot be loaded over the adapter {adapter_name!r}"
    if not isinstance(saved, WaRAConfig):
        raise ValueError(f"{start}, which is a WaRA adapter: it is of type {saved.peft_type}. {way_out}")
    here, found = wara_config(model, adapter_name), fields_in_model(model, adapter_name)
    differences = [*_differences(saved, here), *_differences_by_module(saved, here, found["module_shapes"])]
    if differences:
        raise ValueError(f"{start}, in which equal tensors mean something else: {first_few(differences)}. {way_out}")
    AwaitedAdapter(saved, []).check(found)


def check_keys(model: nn.Module, adapter_name: str, keys: Iterable[str]) -> None:
    """Compare the keys of tensors that are to be loaded with the keys of their modules.

    PEFT would load those tensors whose keys it finds, and leave all other tensors of the module as they were.

    Raises:
        ValueError: a module of the adapter would get more or other tensors than it has, or only some of them.
    """
    given: dict[str, set[str]] = defaultdict(set)
    for key in filter(is_of_a_factor, keys):
        module_name, _, part = key.rpartition(".wara_")
        given[module_name.removeprefix(PEFT_PREFIX)].add(f"wara_{part}")
    different = []
    for name, layer in layers_of(model, adapter_name).items():
        own = set(layer.forms[adapter_name].saved(layer.parts(adapter_name)))
        if given.get(name, own) != own:
            different.append(f"{name!r} (given {_listed(given[name])}; in the model {_listed(own)})")
    if different:
        raise ValueError(
            f"These tensors are of another form, of other levels or ranks, or not all of those of adapter "
            f"{adapter_name!r} in module {first_few(different, 1)}. Load them into an adapter with the config that "
            "they were saved with."
        )


def _saved_config(path: str | os.PathLike[str], hub: Mapping[str, Any], warned: bool) -> PeftConfig | None:
    """Read the config of a saved adapter; give None if there is no file, for PEFT does not need one here."""
    directory = Path(path, hub.get("subfolder") or "")
    if directory.is_dir() and not (directory / CONFIG_NAME).is_file():
        return None
    # `load_adapter` takes further arguments, such as those for loading tensors, which the download does not know.
    hub = {name: value for name, value in hub.items() if name in inspect.signature(hf_hub_download).parameters}
    with warnings.catch_warnings():
        if warned:
            warnings.simplefilter("ignore")
        config: PeftConfig = PeftConfig.from_pretrained(str(path), **hub)
    return config


def _differences(saved: WaRAConfig, here: WaRAConfig) -> Iterator[str]:
    pairs = {name: (getattr(saved, name), getattr(here, name)) for name in ("wavelet", *MEANING, *MEANING_IF_SET)}
    for name, (there, own) in pairs.items():
        # Wavelets have several names ("haar" is "db1"), so their filters are compared.
        same = filters(there) == filters(own) if name == "wavelet" else there == own
        if not same and not (name in MEANING_IF_SET and None in (there, own)):
            yield f"{name}={there!r} there and {own!r} here"
    for name in IN_FULL:
        there, own = getattr(saved, name) or None, getattr(here, name) or None
        same = set(there or ()) == set(own or ()) if name == "modules_to_save" else there == own
        if not same:
            yield f"{name}={there!r} there and {own!r} here"


def _differences_by_module(saved: WaRAConfig, here: WaRAConfig, shapes: Iterable[str]) -> Iterator[str]:
    names = set(shapes) if saved.module_shapes is None else set(shapes) & set(saved.module_shapes)
    for name in sorted(names) if saved.form == here.form and saved.levels == here.levels else ():
        ranks = [{band: rank for band, rank in config.ranks_of(name).items() if rank} for config in (saved, here)]
        if ranks[0] != ranks[1]:
            yield f"ranks {ranks[0]} there and {ranks[1]} here in {name!r}"
            continue
        scalings = [
            scaling(
                config.alpha_of(name), config.form_object.total_rank(config, config.ranks_of(name)), config.use_rslora
            )
            for config in (saved, here)
        ]
        if not math.isclose(*scalings, rel_tol=1e-9):
            yield f"scaling {scalings[0]:g} there and {scalings[1]:g} here in {name!r}"


def _listed(parts: set[str]) -> str:
    return ", ".join(sorted(parts))
