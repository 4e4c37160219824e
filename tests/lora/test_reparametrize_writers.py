"""Whoever writes to a LoRA weight changes the model's output as plain LoRA's, or is refused before a change."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    replace_lora_weights_loftq,
    set_peft_model_state_dict,
)
from peft.tuners.lora import ArrowConfig, LoraLayer
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils import hotswap
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from tests.lora.test_reparametrize import Attention
from tests.references import Mlp
from wara_peft import plain_lora, reparametrize_lora
from wara_peft.lora.reparametrized_layers import ReparametrizedLayer

TARGETS = ["up", "down"]
X = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def lora(seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> PeftModel:
    """The same base model for all seeds, with a LoRA of any values."""
    torch.manual_seed(0)
    base = Mlp().to(dtype)
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 8, "lora_alpha": 6, "target_modules": TARGETS, **fields})
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def reparametrised(seed: int = 0, **fields: Any) -> PeftModel:
    model = lora(seed, **fields)
    reparametrize_lora(model, project=True)
    return model


def plain(model: nn.Module) -> Any:
    result = copy.deepcopy(model)
    plain_lora(result)
    return result


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    result: Tensor = model(X.to(next(model.parameters()).dtype))
    return result


def layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def first(model: Any) -> Any:
    return next(layers(model))


def weights(model: nn.Module) -> list[Any]:
    """The weights as any reader gets them, A before B."""
    return [factor.weight for layer in layers(model) for factor in (layer.lora_A["default"], layer.lora_B["default"])]


def everything(model: Any) -> dict[str, Any]:
    """What a refused write must not have changed."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    settings = {
        name: (type(module), getattr(module, "scaling", None) and dict(module.scaling), getattr(module, "r", None))
        for name, module in model.named_modules()
    }
    trained = {name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()}
    configs = {name: config.to_dict() for name, config in model.peft_config.items()}
    return {"state": state, "settings": settings, "trained": trained, "configs": configs, "output": output(model)}


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (tuple, list)):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


# One row for each place: what it is, what calls it, and the error that refuses it or None.


@dataclasses.dataclass(frozen=True)
class Writer:
    name: str
    write: Callable[[Any, Path], Any]
    refused: str | None = None
    dtype: torch.dtype = torch.float64


def saved(path: Path, seed: int = 1, inside: bool = True, **fields: Any) -> str:
    """A directory with a LoRA, by default one from the same span."""
    (reparametrised if inside else lora)(seed, **fields).save_pretrained(path)
    return str(path)


def saved_half_outside(path: Path) -> str:
    """A LoRA, the last weight of which lies outside of the span."""
    model = plain(reparametrised(1))
    with torch.no_grad():
        weights(model)[-1].normal_()
    model.save_pretrained(path)
    return str(path)


def named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A saved adapter's tensors with the name that it has in the model."""
    return {key.replace(".weight", ".default.weight"): value for key, value in state.items()}


def swap(model: Any, directory: str) -> None:
    hotswap.hotswap_adapter(model, directory, "default", torch_device="cpu")


def swap_without_up(model: Any, path: Path) -> None:
    """PEFT sets what the new adapter lacks to zero."""
    new = load_peft_weights(saved(path), device="cpu")
    state = named({key: value for key, value in new.items() if ".down." in key})
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])


def swap_smaller(model: Any, path: Path) -> None:
    """Four rows that lie in the bands of the first four rows here: aa2, ad2 of aa2, ad2, da2, dd2."""
    small = lora(1, r=4)
    reparametrize_lora(small, subband_ranks={"aa1": 2, "ad1": 2}, project=True)
    small.save_pretrained(path)
    swap(model, str(path))


def swap_halves(model: Any, path: Path) -> None:
    state = named(load_peft_weights(saved_half_outside(path), device="cpu"))
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", LoraConfig(r=8, lora_alpha=60))


def load_state_dict(model: Any, path: Path, **kwargs: Any) -> None:
    model.load_state_dict(reparametrised(1).state_dict(), **kwargs)


def load_half_outside(model: Any, path: Path) -> None:
    model.load_state_dict(named(load_peft_weights(saved_half_outside(path), device="cpu")), strict=False)


def set_state(model: Any, path: Path, **kwargs: Any) -> None:
    set_peft_model_state_dict(model, get_peft_model_state_dict(reparametrised(1)), **kwargs)


def to_all(write: Callable[[Tensor], Any]) -> Callable[[Any, Path], None]:
    def call(model: Any, _: Path) -> None:
        with torch.no_grad():
            for weight in weights(model):
                write(weight)

    return call


def assign(model: Any, _: Path) -> None:
    for layer in layers(model):
        layer.lora_A["default"].weight = nn.Parameter(3 * layer.lora_A["default"].weight.detach())


def register(model: Any, _: Path) -> None:
    factor = first(model).lora_B["default"]
    factor.register_parameter("weight", nn.Parameter(3 * factor.weight.detach()))


def set_data(weight: Tensor) -> None:
    weight.data = 2 * weight.data


def set_rows(weight: Tensor) -> None:
    weight.data[:2] = 0


def hold_and_write(weight: Tensor) -> None:
    held, view = weight.data, weight.detach()[:, 0:1]
    held.mul_(2)
    held.add_(weight)
    del view


def write_out(weight: Tensor) -> None:
    torch.mul(weight, 2.0, out=weight)


def write_list(weight: Tensor) -> None:
    torch._foreach_mul_([weight, weight.data], 1.5)


def swap_tensors(weight: Tensor) -> None:
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone()))


def init(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[Any, Path], None]:
    return lambda model, _: function(weights(model)[0], *args, **kwargs)


def layer_method(name: str, *args: Any) -> Callable[[Any, Path], None]:
    def call(model: Any, _: Path) -> None:
        getattr(first(model), name)("default", *args)

    return call


def corda(model: Any, _: Path) -> None:
    layer, generator = first(model), torch.Generator().manual_seed(0)
    made = [torch.rand(*shape, generator=generator) for shape in [(8,), (20, 8), (12, 8)]]
    layer.get_base_layer().eigens = types.SimpleNamespace(S_WC=made[0], U_WC=made[1], V_WC=made[2])
    layer.corda_init("default", "corda")


def lora_ga(model: Any, _: Path) -> None:
    layer = first(model)
    layer.get_base_layer()._peft_loraga_grad = torch.randn(20, 12)
    layer.lora_ga_init("default", LoraGAConfig())


def loftq(model: Any, _: Path) -> None:
    config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4))
    made = torch.randn(20, 12), torch.randn(8, 12), torch.randn(20, 8)
    with mock.patch("peft.tuners.lora.layer.loftq_init", return_value=made):  # it takes a GPU
        first(model).loftq_init("default", config)


def eva(model: Any, _: Path, names: tuple[str, ...] = ("up", "down"), rank: int = 8) -> None:
    model.peft_config["default"].init_lora_weights = "eva"
    model.peft_config["default"].eva_config = EvaConfig()
    widths = {"up": 12, "down": 20}
    made = {f"base_model.model.{name}": torch.randn(rank, widths[name], dtype=torch.float64) for name in names}
    initialize_lora_eva_weights(model, eva_state_dict=made)


def eva_again(names: tuple[str, ...], rank: int) -> Callable[[Any, Path], None]:
    return lambda model, path: eva(model, path, names, rank)


def update_layer(model: Any, _: Path) -> None:
    """PEFT makes new factors, which are plain."""
    torch.manual_seed(3)
    first(model).update_layer("default", 8, lora_alpha=6, config=LoraConfig(init_lora_weights=False))
    model.double()


def mixed(model: Any, path: Path) -> None:
    """Another adapter beside ours, and one combined of both."""
    model.load_adapter(saved(path), "other")
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type="linear")
    model.set_adapter("sum")


def prepare(rank: int) -> Callable[[Any, Path], None]:
    return lambda model, _: hotswap.prepare_model_for_compiled_hotswap(model, target_rank=rank)


def prepare_and_swap(model: Any, path: Path) -> None:
    prepare(8)(model, path)
    swap(model, saved(path, lora_alpha=11))


def reference_copy(model: Any, _: Path) -> None:
    """As TRL's trainers copy the adapter that they are given, to compare with it."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    to_all(lambda weight: weight.mul_(3))(model, _)
    model.set_adapter("ref")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.mul_(1.5)


def reference_of_shared_storage(model: Any, _: Path) -> None:
    """As TRL's `create_reference_model` shares frozen layers: a copy, whose parameters get the model's data."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.zero_()
    for name, parameter in model.named_parameters():
        reference.get_parameter(name).data = parameter.data
    to_all(lambda weight: weight.mul_(2))(model, _)
    model.forward = reference.forward


def average(model: Any, _: Path) -> None:
    """As Accelerate's LocalSGD averages over processes, with another model in the place of another process."""
    other = reparametrised(1)
    other = other if is_ours(model) else plain(other)
    for parameter, of_other in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = (parameter.data + of_other.data) / 2


def offload(**devices: str) -> Callable[[Any, Path], Any]:
    device_map = {"": "cpu", **{f"base_model.model.{name}": device for name, device in devices.items()}}
    return lambda model, path: dispatch_model(model, device_map, main_device="cpu", offload_dir=str(path))


def is_ours(model: Any) -> bool:
    return any(isinstance(module, ReparametrizedLayer) for module in model.modules())


def intruders(model: Any, _: Path) -> None:
    reduce_intruder_dimension(model, top_k=3, threshold_epsilon=0.999, logging_sink=None)


WRITERS = [
    # PEFT
    Writer("hotswap", lambda model, path: swap(model, saved(path))),
    Writer("hotswap with another scaling", lambda model, path: swap(model, saved(path, lora_alpha=11))),
    Writer("hotswap of fewer modules", swap_without_up),
    Writer("hotswap of a smaller rank in the span", swap_smaller),
    Writer("hotswap after preparing", prepare_and_swap),
    Writer("hotswap of a LoRA outside of the span", lambda m, path: swap(m, saved(path, inside=False)), "span"),
    Writer("hotswap, the last weight outside", swap_halves, "down.*span"),
    Writer("hotswap of a larger rank", lambda m, path: swap(m, saved(path, r=12)), "shape"),
    Writer("hotswap of a smaller rank", lambda m, path: swap(m, saved(path, r=6)), "span"),
    Writer("preparing for a larger rank", prepare(16), "plain_lora"),
    Writer("load_adapter over the same name", lambda m, path: m.load_adapter(saved(path), "default")),
    Writer("set_peft_model_state_dict", set_state),
    Writer("set_peft_model_state_dict, assigning", lambda m, path: set_state(m, path, low_cpu_mem_usage=True)),
    Writer("reset_lora_parameters", layer_method("reset_lora_parameters", True), "span"),
    Writer("reset_lora_parameters, gaussian", layer_method("reset_lora_parameters", "gaussian"), "span"),
    Writer("PiSSA", layer_method("pissa_init", "pissa"), "span", torch.float32),
    Writer("PiSSA by iterations", layer_method("pissa_init", "pissa_niter_2"), "span", torch.float32),
    Writer("OLoRA", layer_method("olora_init"), "span", torch.float32),
    Writer("MiCA", layer_method("mica_init"), "span", torch.float32),
    Writer("orthogonal", layer_method("orthogonal_init"), "span"),
    Writer("CorDA", corda, "span", torch.float32),
    Writer("LoRA-GA", lora_ga, "span"),
    Writer("LoftQ", loftq, "span", torch.float32),
    Writer("LoftQ again", lambda m, path: replace_lora_weights_loftq(m, path), "plain_lora"),
    Writer("EVA", eva, "plain_lora"),
    Writer("EVA without a layer", eva_again(("up",), 8), "plain_lora"),
    Writer("EVA with another rank", eva_again(("up", "down"), 6), "plain_lora"),
    Writer("EVA with rank zero", eva_again(("up", "down"), 0), "plain_lora"),
    Writer("update_layer", update_layer),
    Writer("add_weighted_adapter", mixed),
    Writer("the reduction of intruders", intruders),
    # TRL
    Writer("TRL's reference adapter", reference_copy),
    Writer("TRL's reference model", reference_of_shared_storage),
    # Accelerate
    Writer("LocalSGD", average),
    Writer("cpu_offload", lambda model, _: cpu_offload(model, "cpu"), "plain_lora"),
    Writer("disk_offload", lambda model, path: disk_offload(model, str(path), "cpu"), "plain_lora"),
    Writer("dispatch_model", offload(up="disk"), "plain_lora"),
    # PyTorch
    Writer("load_state_dict", load_state_dict),
    Writer("load_state_dict, assigning", lambda m, path: load_state_dict(m, path, assign=True)),
    Writer("load_state_dict, the last weight outside", load_half_outside, "down.*span"),
    Writer("an assigned parameter", assign),
    Writer("register_parameter", register),
    Writer("an assigned .data", to_all(set_data)),
    Writer("mul_", to_all(lambda weight: weight.mul_(2))),
    Writer("mul_ of .data", to_all(lambda weight: weight.data.mul_(2))),
    Writer("+=", to_all(lambda weight: weight.data.__iadd__(weight.detach()))),
    Writer("zero_", to_all(lambda weight: weight.zero_())),
    Writer("fill_ of .data", to_all(lambda weight: weight.data.fill_(0.0))),
    Writer("copy_", to_all(lambda weight: weight.copy_(weight.detach().clone() * 3))),
    Writer("two rows of .data", to_all(set_rows)),
    Writer("a kept .data", to_all(hold_and_write)),
    Writer("out=", to_all(write_out)),
    Writer("_foreach_", to_all(write_list)),
    Writer("apply_", to_all(lambda weight: weight.data.apply_(lambda value: 2 * value))),
    Writer("apply_ to a view", to_all(lambda weight: weight.data[:2].apply_(lambda value: 2 * value))),
    Writer("map_", to_all(lambda weight: weight.data.map_(weight.detach().clone(), lambda one, other: one + other))),
    Writer("nn.init.zeros_", init(nn.init.zeros_)),
    Writer("nn.init.normal_", init(nn.init.normal_), "span"),
    Writer("nn.init.kaiming_uniform_", init(nn.init.kaiming_uniform_), "span"),
    Writer("nn.init.orthogonal_", init(nn.init.orthogonal_), "span"),
    Writer("reset_parameters", lambda m, _: first(m).lora_A["default"].reset_parameters(), "span"),
    Writer("copy_ of other values", to_all(lambda weight: weight.copy_(torch.ones_like(weight))), "span"),
    Writer("swap_tensors", to_all(swap_tensors), "slots"),
]
each_writer = pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)


@each_writer
@pytest.mark.filterwarnings("ignore:the following layers were initialized with init_lora_weights=True")
def test_writer(writer, tmp_path):
    model = reparametrised(dtype=writer.dtype)
    twin, before = plain(model), everything(model)
    if writer.refused is None:
        writer.write(model, tmp_path / "ours")
        writer.write(twin, tmp_path / "plain")
        assert not torch.allclose(output(model), before["output"], atol=1e-3)
        torch.testing.assert_close(output(model), output(twin), atol=1e-10, rtol=1e-10)
    else:
        config = copy.deepcopy(model.peft_config["default"])
        with pytest.raises((ValueError, RuntimeError), match=writer.refused):
            writer.write(model, tmp_path)
        model.peft_config["default"] = config if "EVA" in writer.name else model.peft_config["default"]
        assert_same(everything(model), before)


# Other places


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_merging_in_half_precision_writes_the_weights_back(kind, dtype):
    """On CPUs PEFT computes ΔW in float32, and then assigns to the weights what they were."""
    torch.manual_seed(0)
    base = Mlp() if kind == "linear" else Attention()
    targets = TARGETS if kind == "linear" else ["attn"]
    model = get_peft_model(
        base, LoraConfig(r=8, target_modules=targets, init_lora_weights=False), autocast_adapter_dtype=False
    ).to(dtype)
    reparametrize_lora(model, project=True)
    twin, before = plain(model), {name: parameter.clone() for name, parameter in model.named_parameters()}
    for one in (model, twin):
        one.merge_adapter()
    state = twin.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if ".factor." in name)


def test_general_knowledge_subtraction_of_arrow():
    model = reparametrised()
    model.add_adapter("general", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".general." in name:
                parameter.normal_(std=0.3)
    twin = plain(model)
    for one in (model, twin):
        for layer in layers(one):
            config = ArrowConfig(use_gks=True)
            config.task_adapter_names, config.gks_adapter_names = ["default"], ["general"]
            arrow = ArrowLoraLinearLayer(layer.in_features, config)
            arrow.gen_know_sub(layer.lora_A, layer.lora_B)
    before = output(reparametrised())
    assert not torch.allclose(output(model), before, atol=1e-3)
    torch.testing.assert_close(output(model), output(twin), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("plan", ["colwise", "rowwise"])
def test_broadcast_under_tensor_parallelism_is_refused(plan):
    """`reset_lora_parameters` sends the weights of the first rank to all."""
    model = reparametrised()
    before = everything(model)
    base = first(model).get_base_layer()
    base._hf_tp_plan, base._hf_device_mesh = plan, mock.Mock()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    base._hf_device_mesh.get_group.return_value = torch.distributed.group.WORLD
    try:
        with pytest.raises(RuntimeError, match="plain_lora"):
            first(model).reset_lora_parameters("default", False)
    finally:
        torch.distributed.destroy_process_group()
    assert_same(everything(model), before)


WRITES = re.compile(
    r"(lora_[AB]\b|target_lora|old_val|new_layer|ref_param)[^=(]*(\.data\b[^=]*(?<![=!<>])=(?!=)|\.weight\s*=(?!=)|\.\w+_\()"
    r"|init\.\w+_\([^)]*lora_[AB]\b|broadcast\([^)]*lora_|swap_tensors\(|setattr\(module_obj"
)
PLACES = {
    "peft/tuners/lora/arrow.py::gen_know_sub": test_general_knowledge_subtraction_of_arrow,
    "peft/tuners/lora/eva.py::_load_eva_state_dict": "EVA",
    "peft/tuners/lora/intruders.py::reduce_intruder_dimension": "the reduction of intruders",
    "peft/tuners/lora/layer.py::update_layer": "update_layer",
    "peft/tuners/lora/layer.py::reset_lora_parameters": "reset_lora_parameters",
    "peft/tuners/lora/layer.py::olora_init": "OLoRA",
    "peft/tuners/lora/layer.py::pissa_init": "PiSSA",
    "peft/tuners/lora/layer.py::mica_init": "MiCA",
    "peft/tuners/lora/layer.py::corda_init": "CorDA",
    "peft/tuners/lora/layer.py::loftq_init": "LoftQ",
    "peft/tuners/lora/layer.py::orthogonal_init": "orthogonal",
    "peft/tuners/lora/layer.py::lora_ga_init": "LoRA-GA",
    "peft/tuners/lora/layer.py::get_delta_weight": test_merging_in_half_precision_writes_the_weights_back,
    "peft/tuners/lora/tp_layer.py::get_delta_weight": test_merging_in_half_precision_writes_the_weights_back,
    "peft/tuners/lora/model.py::add_weighted_adapter": "add_weighted_adapter",
    "peft/utils/hotswap.py::_get_padded_linear": "preparing for a larger rank",
    "peft/utils/hotswap.py::_get_padded_conv2d": "preparing for a larger rank",
    "peft/utils/hotswap.py::hotswap_adapter_from_state_dict": "hotswap",
    "peft/utils/loftq_utils.py::replace_lora_weights_loftq": "LoftQ again",
    "transformers/core_model_loading.py::set_param_for_module": "an assigned parameter",
    "trl/experimental/utils.py::create_reference_model": "TRL's reference model",
    "trl/trainer/dpo_trainer.py::__init__": "TRL's reference adapter",
    "trl/trainer/grpo_trainer.py::__init__": "TRL's reference adapter",
    "trl/trainer/kto_trainer.py::__init__": "TRL's reference adapter",
    "trl/trainer/rloo_trainer.py::__init__": "TRL's reference adapter",
}
"""Functions of the libraries that write to LoRA weights, each with a row of `WRITERS` or a test above."""
NOT_LORA = {
    "transformers/pytorch_utils.py::prune_linear_layer": "makes new layers",
    "diffusers/hooks/group_offloading.py::_swap_torchao_tensor": "swaps tensors of torchao",
}


@pytest.mark.slow
def test_every_place_that_writes_has_its_row():
    """A new version of a library may bring a new place, which then needs a row."""
    found = set()
    for package in ("peft", "transformers", "trl", "diffusers", "accelerate"):
        root = Path(importlib.util.find_spec(package).origin).parent
        for path in root.rglob("*.py"):
            name, text = str(path.relative_to(root.parent)), path.read_text(encoding="utf-8")
            if not WRITES.search(text) or ("/tuners/" in name and "/tuners/lora/" not in name):
                continue
            functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
            for number, line in enumerate(text.splitlines(), 1):
                if WRITES.search(line) and not line.strip().startswith(("#", "`", ">")):
                    around = [node for node in functions if node.lineno <= number <= node.end_lineno]
                    found.add(f"{name}::{max(around, key=lambda node: node.lineno).name}")
    assert found - PLACES.keys() - NOT_LORA.keys() == set()
    assert "peft/utils/hotswap.py::hotswap_adapter_from_state_dict" in found
    rows = {writer.name for writer in WRITERS}
    assert all(callable(row) or row in rows for row in PLACES.values())
