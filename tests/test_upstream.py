"""Names of other packages that may change without notice: the package uses those that are listed here, and no others.

A name with an underscore is private, and a method that we override is called as its package sees fit. Each is listed
with the release in which it was last looked at, so that what a new release has moved is found here first.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import bitsandbytes.functional
import diffusers.loaders.lora_pipeline
import peft.utils
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import HookRegistry
from packaging.requirements import Requirement
from peft.config import PeftConfigMixin
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.quantizers.base import HfQuantizer

import wara_peft
from docs.layout import files
from tests.test_project import PROJECT

PACKAGE = Path(wara_peft.__file__).parent
HOOKED = nn.Identity()
HookRegistry.check_if_exists_or_initialize(HOOKED)
FLATTENED = nn.Parameter(torch.zeros(1))
_set_fsdp_flattened(FLATTENED)
TINY = {"num_local_experts": 1, "hidden_size": 2, "intermediate_size": 2}


class Seen(NamedTuple):
    """Names that the package takes from another one.

    Attributes:
        release: in which these were last looked at.
        names: private names, beside what has them: a module, a class, or an object.
        overridden: methods that our subclasses replace or extend, each with its parameters in that release.
    """

    release: str
    names: list[tuple[Any, str]]
    overridden: dict[type, dict[str, str]]


UPSTREAM = {
    "peft": Seen(
        "0.21.2",
        [
            (tuners_utils, "_check_lora_target_modules_mamba _get_in_out_features _maybe_include_all_linear_layers"),
            (peft.utils, "_get_submodules"),
            (BaseTuner, "_check_tied_module_exists"),
            (BaseTunerLayer, "_active_adapter _cast_input_dtype _disable_adapters _get_embed_scale"),
            (peft.utils.ModulesToSaveWrapper(nn.Linear(1, 1), "default"), "_adapters"),
        ],
        {
            BaseTuner: {
                "inject_adapter": "model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict",
                "merge_adapter": "adapter_names safe_merge",
                "_add_modules_to_save_to_tie": "peft_config tied_weight_keys",
                "_add_targets_to_tie": "peft_config tied_weight_keys",
                "_cast_adapter_dtype": "adapter_name autocast_adapter_dtype",
                "unmerge_adapter": "",
                "_enable_adapter_layers": "enabled",
                "_get_adapter_state_dict": "model config adapter_name state_dict unwanted_adapter_names",
                "_get_learnable_bias_state_dict": "model state_dict config",
                "_remap_adapter_state_dict_for_load": "model config adapter_name state_dict",
                "_remove_adapter_name_from_key": "key adapter_name",
                "_convert_state_dict_for_initial_model": "peft_model peft_config "
                "path_initial_model_for_weight_conversion output_state_dict kwargs",
                "_create_and_replace": "peft_config adapter_name target target_name parent current_key parameter_name",
                "_inject_parameters": "peft_config model adapter_name low_cpu_mem_usage",
                "_prepare_adapter_config": "peft_config model_config",
                "_prepare_model": "peft_config model",
                "_replace_module": "parent child_name new_module child",
                "_unload_and_optionally_merge": "merge progressbar safe_merge adapter_names",
            },
            BaseTunerLayer: {
                "delete_adapter": "adapter_name",
                "enable_adapters": "enabled",
                "merge": "safe_merge adapter_names",
                "supports_lora_conversion": "adapter_name",
                "unmerge": "",
                "_move_adapter_to_device_of_base_layer": "adapter_name device",
            },
            PeftConfigMixin: {"save_pretrained": "save_directory kwargs", "to_dict": ""},
        },
    ),
    "transformers": Seen(
        "5.23.0",
        [
            (transformers.AutoModelForCausalLM, "_model_mapping"),
            (transformers.PreTrainedModel, "_init_weights _keys_to_ignore_on_save _tied_weights_keys"),
            (transformers.PreTrainedModel, "_keys_to_ignore_on_load_unexpected"),
            (MixtralExperts(transformers.MixtralConfig(**TINY)), "_is_expert_parallel"),
        ],
        {
            HfQuantizer: {
                "_process_model_after_weight_loading": "model kwargs",
                "_process_model_before_weight_loading": "model kwargs",
            }
        },
    ),
    "torch": Seen(
        "2.13.0",
        [
            (torch, "_C _grouped_mm _subclasses"),
            (torch._C, "_are_functorch_transforms_active _get_tracing_state _is_any_autocast_enabled"),
            (torch.Tensor, "_make_wrapper_subclass _typed_storage _version"),
            (torch.ops.aten.detach.default, "_schema"),
            (torch.utils, "_pytree"),
            (torch.compile(nn.Identity()), "_orig_mod"),
            (nn.Module(), "_buffers _call_impl _compiled_call_impl"),
            (nn.Module(), "_forward_hooks _forward_pre_hooks _forward_pre_hooks_with_kwargs _modules _parameters"),
            (nn.Module(), "_forward_hooks_with_kwargs _forward_hooks_always_called"),
            (nn.Module(), "_backward_hooks _backward_pre_hooks _is_full_backward_hook"),
            (nn.Module()._replicate_for_data_parallel(), "_is_replica"),
            (nn.Module(), "_load_state_dict_pre_hooks _register_state_dict_hook"),
            (FLATTENED, "_fsdp_flattened"),
            (nn.modules.conv, "_ConvNd"),
            (nn.Conv1d, "_conv_forward"),
            (nn.MultiheadAttention(1, 1), "_qkv_same_embed_dim"),
        ],
        {
            nn.Module: {
                "_apply": "fn recurse",
                "_load_from_state_dict": "state_dict prefix local_metadata strict missing_keys unexpected_keys "
                "error_msgs",
                "_replicate_for_data_parallel": "",
            }
        },
    ),
    "accelerate": Seen("1.15.0", [(add_hook_to_module(nn.Linear(1, 1), ModelHook()), "_hf_hook")], {}),
    "bitsandbytes": Seen("0.50.2", [(bitsandbytes.functional, "_convert_weight_packed_for_cpu_inverse")], {}),
    "diffusers": Seen(
        "0.42.1",
        [
            (diffusers.loaders.lora_pipeline.StableDiffusionLoraLoaderMixin, "_lora_loadable_modules"),
            (HOOKED, "_diffusers_hook"),
        ],
        {},
    ),
}
MEMBER = enum.Enum("MEMBER", "one").one  # type: ignore[attr-defined]
PYTHON = [
    (MEMBER, "_name_ _value_ _sort_order_"),
    (type(MEMBER), "_member_names_ _member_map_ _value2member_map_"),
]
"""Attributes by which a member is added to PEFT's enumeration; Python 3.13 has one more, which is looked for."""
SINCE_PYTHON_3_13 = {"_hashable_values_"}
OURS = {
    *("_added_by_wara_peft", "_asks_the_tuner", "_marks", "_reparametrizes", "_use_nested_tensor_without_adapters"),
    *("_is_hf_initialized", "_is_quantized", "_weight_conversions"),
}
"""Attributes that we put on objects of others; the last two are transformers' own, which no class has."""

OWNERS = [*(pair for seen in UPSTREAM.values() for pair in seen.names), *PYTHON]
OVERRIDDEN = [
    (package, owner, name, parameters)
    for package, seen in UPSTREAM.items()
    for owner, methods in seen.overridden.items()
    for name, parameters in methods.items()
]


def is_private(name: str) -> bool:
    return name.isidentifier() and name.strip("_") != "" and name.startswith("_") and not name.startswith("__")


def names_in(source: str) -> tuple[set[str], set[str]]:
    """Private names that a file uses, as an attribute, an import or a string; and those that it defines itself."""
    used, defined = set(), set()
    fragments: set[int] = set()  # of f-strings, which come before their parts
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.JoinedStr(values=parts):
                fragments |= set(map(id, parts))
            case ast.ImportFrom(module=str(module), names=aliases, level=0) if not module.startswith("wara_peft"):
                used |= {*module.split("."), *(alias.name for alias in aliases)}
            case ast.Import(names=aliases):
                used |= {part for alias in aliases for part in alias.name.split(".")}
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(attr=name):
                used.add(name)
            case ast.Constant(value=str(name)) if id(node) not in fragments:
                used.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                defined.add(name)
    return set(filter(is_private, used)), set(filter(is_private, defined))


def listed() -> set[str]:
    return {name for _, names in OWNERS for name in names.split()} | SINCE_PYTHON_3_13


def classes() -> Iterator[type]:
    """All classes that the package defines."""
    for found in pkgutil.walk_packages([str(PACKAGE)], "wara_peft."):
        for one in vars(importlib.import_module(found.name)).values():
            if isinstance(one, type) and one.__module__ == found.name:
                yield one


def test_names_are_found():
    source = (
        "from torch._inner import _taken\nfrom .own import _ours\n\n\nclass _Own:\n    def _method(self, one):\n"
        "        self._kept = one._foreign\n        one._put = getattr(one, '_by_name', self._kept)\n"
        "        return one.__class__, _, '_ A sentence', f'{one}_part'\n"
    )
    assert names_in(source) == (
        {"_inner", "_taken", "_foreign", "_put", "_by_name", "_kept"},
        {"_Own", "_method", "_kept"},
    )


def test_no_private_name_is_used_that_is_not_listed():
    """Names that the package defines are its own, unless a listed class has them too."""
    pairs = [names_in(path.read_text(encoding="utf-8")) for path in files()]
    used, defined = (set().union(*sets) for sets in zip(*pairs, strict=True))
    assert len(used) > 50
    owners = [owner for owner, _ in OWNERS if not isinstance(owner, ModuleType)]
    overridden = {name for _, _, name, _ in OVERRIDDEN}
    foreign = {name for name in used if name not in defined or any(hasattr(owner, name) for owner in owners)}
    assert " ".join(sorted(foreign - OURS - overridden - listed())) == "", (
        "list these above, with the release that has them"
    )
    assert " ".join(sorted((listed() | OURS) - used - defined)) == "", (
        "these are no longer used: take them off the list"
    )


@pytest.mark.parametrize(
    ("owner", "name"),
    [pytest.param(owner, name, id=name) for owner, names in OWNERS for name in names.split()],
)
def test_the_installed_release_has_the_name(owner, name):
    assert hasattr(owner, name)


def test_no_method_is_overridden_that_is_not_listed():
    """All methods of PEFT's base classes, and the private ones of PyTorch's, transformers' and others'."""
    found = set()
    for one in classes():
        for base in one.__mro__[1:]:
            package = base.__module__.partition(".")[0]
            for name, value in vars(one).items():
                method = vars(base).get(name)
                is_method = inspect.isroutine(method) and (inspect.isroutine(value) or isinstance(value, property))
                counts = is_private(name) or (package == "peft" and not name.startswith("_"))
                if package in UPSTREAM and is_method and counts:
                    found.add(f"{package}: {base.__name__}.{name}")
    known = {f"{package}: {owner.__name__}.{name}" for package, owner, name, _ in OVERRIDDEN}
    assert ", ".join(sorted(found - known)) == "", "list these above, with their parameters"
    assert ", ".join(sorted(known - found)) == "", "these are no longer overridden: take them off the list"


@pytest.mark.parametrize(
    ("owner", "name", "parameters"), [pytest.param(*row, id=f"{row[0].__name__}.{row[1]}") for _, *row in OVERRIDDEN]
)
def test_an_overridden_method_is_called_as_it_was(owner, name, parameters):
    """The installed method takes the listed parameters, then only optional ones; ours take them in the same order."""
    theirs = parameters_of(owner, name)
    known = parameters.split()
    assert [one.name for one in theirs[: len(known)]] == known
    assert all(one.default is not one.empty for one in theirs[len(known) :])
    subclasses = [one for one in classes() if issubclass(one, owner) and name in vars(one)]
    assert subclasses
    for subclass in subclasses:
        ours = parameters_of(subclass, name)
        takes_all = any(one.kind is one.VAR_POSITIONAL for one in ours)
        named = [one for one in ours if one.kind is one.POSITIONAL_OR_KEYWORD or not takes_all]
        shared = len(named) if takes_all else len(theirs)
        assert [one.name for one in named[:shared]] == [one.name for one in theirs[:shared]], subclass
        assert all(one.default is not one.empty for one in named[shared:]), subclass


def parameters_of(owner: type, name: str) -> list[inspect.Parameter]:
    """Parameters of a method, without `self` or `cls`."""
    method = vars(owner)[name]
    return list(inspect.signature(getattr(method, "__func__", method)).parameters.values())[1:]


@pytest.mark.parametrize("package", UPSTREAM)
def test_releases_that_were_looked_at_are_in_the_ranges_that_are_claimed(package):
    optional = PROJECT["optional-dependencies"].values()
    entries = [
        Requirement(entry) for entry in (*PROJECT["dependencies"], *(one for extra in optional for one in extra))
    ]
    (claimed,) = {str(entry.specifier) for entry in entries if entry.name == package}
    assert Requirement(f"{package}{claimed}").specifier.contains(UPSTREAM[package].release)
