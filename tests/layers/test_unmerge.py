"""Unmerging puts base weights back to the bit, whatever happened to the adapters and the model in between."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.functional import delete_adapter
from torch import Tensor, nn

from tests.base_layers.test_quantization import WARNING
from tests.base_layers.test_quantization import Mlp as QuantizedMlp
from tests.diffusion_models import unet
from tests.injection.test_weight_tying import llama
from tests.layers.test_factorized import Layers
from tests.layers.test_multihead import Encoder
from tests.layers.test_parameters import EXPERTS, gpt_oss, mixtral
from tests.references import Chain, Conv1DModel, Mlp
from wara_peft import WaRAConfig
from wara_peft.layers.base import WaRALayer
from wara_peft.layers.kept_weight import Seal

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter a was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
    pytest.mark.filterwarnings(f"ignore:{WARNING}:UserWarning"),
]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 6, 2)
        self.one, self.two, self.three = layers
        self.tokens = nn.Embedding(9, 6)


# base model, targets: one row a kind of layer
KINDS = {
    "linear": (Mlp, {"target_modules": ["up", "down"]}),
    "bfloat16": (lambda: Mlp().bfloat16(), {"target_modules": ["up", "down"]}),
    "float16": (lambda: Mlp().half(), {"target_modules": ["up", "down"]}),
    "conv1d": (Conv1DModel, {"target_modules": ["proj"]}),
    "convolutions": (Convolutions, {"target_modules": ["one", "two", "three", "tokens"]}),
    "experts": (mixtral, {"target_modules": [], "target_parameters": EXPERTS}),
    "experts in first": (gpt_oss, {"target_modules": [], "target_parameters": EXPERTS}),
    "attention": (Encoder, {"target_modules": ["self_attn"]}),
    "factorized": (Layers, {"target_modules": ["first", "second"], "subband_ranks": {"ad1": 0, "da1": 0}}),
    "tied": (llama, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "nf4": (lambda: QuantizedMlp("nf4"), {"target_modules": ["up", "down"]}),
    "nf4-double": (lambda: QuantizedMlp("nf4-double"), {"target_modules": ["up", "down"]}),
    "int8": (lambda: QuantizedMlp("int8"), {"target_modules": ["up", "down"]}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
PLAIN = [kind for kind in KINDS if "nf4" not in kind and kind != "int8"]


def model_of(kind: str, *names: str) -> PeftModel:
    """The base model of a row with adapters a, b, ... whose ΔW is about a tenth of the weights."""
    torch.manual_seed(0)
    make, targets = KINDS[kind]
    base = make().eval()
    config = WaRAConfig(r=1, **targets)
    model = get_peft_model(base, config, adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    fill(model)
    return model


def fill(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "wara_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """All that the model has beside its adapters, statistics of quantized weights included."""
    state = model.state_dict()
    return {name: value.clone() for name, value in state.items() if "wara_" not in name and torch.is_tensor(value)}


def layers_of(model: nn.Module) -> list[WaRALayer]:
    return [module for module in model.modules() if isinstance(module, WaRALayer)]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def changed(found: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    return any(
        found[name].shape != value.shape or not torch.equal(found[name], value) for name, value in before.items()
    )


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name="a", save_embedding_layers=False)


def step(model: nn.Module) -> None:
    for layer in layers_of(model):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    torch.optim.SGD(parameters, lr=0.3).step()
    model.zero_grad()


BETWEEN = {
    "nothing": lambda model: None,
    "set_scale": lambda model: [layer.set_scale("a", 3.0) for layer in layers_of(model)],
    "step": step,
    "load_state_dict": lambda model: set_peft_model_state_dict(
        model, {name: value * 2 for name, value in adapter_of(model).items()}, "a"
    ),
    "values": lambda model: fill(model, seed=2),
}


@each_kind
def test_the_base_is_back_to_the_bit(kind):
    model = model_of(kind, "a")
    before = base_of(model)
    for between in BETWEEN.values():
        model.merge_adapter(safe_merge=True)
        assert changed(base_of(model), before)
        deltas = [layer.get_delta_weight("a").clone() for layer in layers_of(model)]
        between(model)
        now = [layer.get_delta_weight("a") for layer in layers_of(model)]
        assert between is BETWEEN["nothing"] or not any(map(torch.equal, deltas, now))
        model.unmerge_adapter()
        assert_same(base_of(model), before)
        assert not any(layer.merged for layer in layers_of(model))


@each_kind
def test_twenty_cycles_as_trl_merges_and_unmerges_at_each_sync(kind):
    model = model_of(kind, "a")
    before = base_of(model)
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
        step(model)
    assert_same(base_of(model), before)


@each_kind
def test_disabling_and_activating_unmerge(kind):
    model = model_of(kind, "a", "b")
    before = base_of(model)
    model.merge_adapter()
    BETWEEN["set_scale"](model)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    assert_same(base_of(model), before)


def test_a_disabled_forward_unmerges():
    model = model_of("linear", "a")
    x, plain = torch.randn(3, 12), Mlp()
    plain.load_state_dict({name.replace("base_layer.", ""): v for name, v in base_of(model.base_model.model).items()})
    model.merge_adapter()
    fill(model, seed=2)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))


@each_kind
@pytest.mark.parametrize("order", [["a", "b", "c"], ["c", "a", "b"]])
def test_what_remains_is_as_if_only_the_others_had_been_merged(kind, order):
    model = model_of(kind, "a", "b", "c")
    before = base_of(model)
    expected = copy.deepcopy(model)
    expected.merge_adapter(adapter_names=[name for name in order if name != "a"])
    all_of_them = copy.deepcopy(model)
    all_of_them.merge_adapter(adapter_names=order)

    for name in order:
        model.merge_adapter(adapter_names=[name])
    assert_same(base_of(model), base_of(all_of_them))
    fill(model, seed=2)
    model.unmerge_adapter(["a"])
    assert_same(base_of(model), base_of(expected))
    assert {tuple(layer.merged_adapters) for layer in layers_of(model)} == {tuple(n for n in order if n != "a")}
    model.unmerge_adapter()
    assert_same(base_of(model), before)


@each_kind
def test_a_merged_adapter_is_deleted(kind):
    """Delete as transformers and diffusers do; PEFT's tuner asks to unmerge first."""
    model = model_of(kind, "a", "b")
    before, expected = base_of(model), copy.deepcopy(model)
    expected.merge_adapter(adapter_names=["b"])
    model.merge_adapter(adapter_names=["a"])
    model.merge_adapter(adapter_names=["b"])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("a")
    delete_adapter(model.base_model.model, "a", prefix="wara_")
    assert_same(base_of(model), base_of(expected))
    delete_adapter(model.base_model.model, "b", prefix="wara_")
    assert_same(base_of(model), before)


@pytest.mark.parametrize("kind", ["linear", "nf4", "int8", "experts", "factorized", "bfloat16"])
@pytest.mark.parametrize("first", [[], ["b"]])
def test_errors_in_between_leave_everything_as_it_was(kind, first, monkeypatch):
    model = model_of(kind, "a", "b")
    before = base_of(model)
    if first:
        model.merge_adapter(adapter_names=first)
    merged = base_of(model)
    last = layers_of(model)[-1]
    owner = "set_factorized" if kind == "factorized" else "set_base_weight"
    write, calls = getattr(last, owner), []

    def fail(*args, **kwargs):
        if calls:
            write(*args, **kwargs)
            return
        calls.append(1)
        write(*args, **kwargs)
        raise MemoryError("no memory left")

    monkeypatch.setattr(last, owner, fail)
    with pytest.raises(MemoryError, match="no memory left"):
        model.merge_adapter(adapter_names=["a"])
    assert all(layer.merged_adapters == first for layer in layers_of(model))
    assert_same(base_of(model), merged)
    if first:
        model.unmerge_adapter()
    assert_same(base_of(model), before)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.bfloat16(),
        lambda model: model.half().double(),
        lambda model: model.to("cpu"),
    ],
    ids=["bfloat16", "half double", "to device"],
)
def test_casts_are_followed(kind, move):
    model = model_of(kind, "a", "b")
    moved = move(copy.deepcopy(model))
    model.merge_adapter(adapter_names=["a"])
    model.merge_adapter(adapter_names=["b"])
    move(model)
    model.unmerge_adapter()
    assert_same(base_of(model), base_of(moved))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_casts_leave_quantized_weights(kind):
    model = model_of(kind, "a")
    plain = copy.deepcopy(model)
    model.merge_adapter()
    for each in (model, plain):
        each.bfloat16()
    model.unmerge_adapter()
    assert_same(base_of(model), base_of(plain))


def test_a_weight_that_is_moved_by_hand_is_followed():
    """Give parameters new data, as offloading hooks do."""
    model = model_of("linear", "a")
    before = base_of(model)
    model.merge_adapter()
    for layer in layers_of(model):
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
    model.unmerge_adapter()
    assert_same(base_of(model), before)


def add_one(weight: Tensor) -> None:
    weight.data.add_(torch.ones((), dtype=weight.dtype))


WRITES = {
    "in place": lambda layer, weight: add_one(weight),
    "one entry": lambda layer, weight: weight.data.view(-1)[-1:].add_(1),
    "two rows": lambda layer, weight: weight.data.copy_(weight.data.roll(1, 0)),
    "load_state_dict": lambda layer, weight: layer.get_base_layer().load_state_dict(
        {name: torch.zeros_like(value) for name, value in layer.get_base_layer().state_dict().items()}
    ),
    "assigned": lambda layer, weight: setattr(weight, "data", torch.zeros_like(weight.data)),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("kind", "cast"),
    [(kind, False) for kind in ("linear", "bfloat16", "conv1d", "tied", "experts", "factorized", "attention", "nf4")]
    + [("linear", True), ("factorized", True), ("attention", True)],
)
def test_a_base_that_somebody_else_wrote_is_refused(kind, write, cast):
    if write == "load_state_dict" and kind in ("experts", "attention", "nf4"):
        pytest.skip("the layer is no module with a state dict of its weight")
    model = model_of(kind, "a", "b")
    model.merge_adapter(adapter_names=["a"])
    layer = layers_of(model)[-1 if kind != "tied" else 0]
    owner, name = layer.weight_place()
    weight = owner.down.weight if kind == "factorized" else getattr(owner, name)
    WRITES[write](layer, weight)
    if cast:
        model.half()
    before = base_of(model)
    for action in (
        model.unmerge_adapter,
        lambda: model.unmerge_adapter(["a"]),
        lambda: model.merge_adapter(adapter_names=["b"]),
        layer.unmerge,
    ):
        with pytest.raises(
            ValueError, match=rf"weight of module '{layer.module_name}' has been written since .*\(a\)"
        ):
            action()
        assert_same(base_of(model), before)
        assert all(each.merged_adapters == ["a"] for each in layers_of(model))


@each_kind
def test_what_is_kept_is_in_no_state_dict_copy_or_pickle(kind):
    model = model_of(kind, "a")
    keys = model.state_dict().keys()
    plain_size = len(pickle.dumps(model))
    model.merge_adapter()
    if kind != "factorized":  # which is larger when merged
        assert model.state_dict().keys() == keys
        assert len(pickle.dumps(model)) < 1.02 * plain_size + 2000
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        merged = base_of(other)
        for action in (other.unmerge_adapter, layers_of(other)[0].unmerge):
            with pytest.raises(ValueError, match=r"is a copy of one with merged adapters \(a\).*before you copy"):
                action()
        assert_same(base_of(other), merged)
    merged = base_of(model.base_model.model)
    unloaded = other.merge_and_unload()
    values = {name.replace("base_layer.", ""): value for name, value in merged.items()}
    assert_same(base_of(unloaded), values)


@pytest.mark.parametrize("kind", ["linear", "experts", "factorized", "nf4"])
@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_keeps_nothing(kind, merged_before):
    model = model_of(kind, "a")
    layers = layers_of(model)
    if merged_before:
        model.merge_adapter()
    kept = [weakref.ref(layer._kept) for layer in layers if layer._kept is not None]
    gc.disable()
    try:
        unloaded = model.merge_and_unload()
        assert len(kept) == len(layers) * merged_before and all(reference() is None for reference in kept)
        assert all(layer._kept is None for layer in layers)
    finally:
        gc.enable()
    assert not layers_of(unloaded)


def test_what_is_kept_takes_as_much_as_the_weights_and_lies_in_main_memory():
    model = model_of("linear", "a")
    weights = {layer: layer.base_layer.weight.data for layer in layers_of(model)}
    model.merge_adapter()
    for layer, weight in weights.items():
        assert layer._kept.data.data_ptr() == weight.data_ptr()  # the very tensor: nothing is copied on the CPU
    model.unmerge_adapter()
    assert all(layer._kept is None for layer in weights)
    assert all(layer.base_layer.weight.data_ptr() == weight.data_ptr() for layer, weight in weights.items())


def test_a_base_parameter_stays_the_same_object():
    model = model_of("linear", "a")
    before = [layer.base_layer.weight for layer in layers_of(model)]
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(layer.base_layer.weight is weight for layer, weight in zip(layers_of(model), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_fuses_sets_and_unfuses(dtype):
    model = unet().to(dtype)
    before = base_of(model)
    for name in ("a", "b"):
        model.add_adapter(WaRAConfig(target_modules=["to_q", "to_v", "conv1"], init_weights=False, r=1), name)
    model.set_adapters(["a", "b"], [0.5, 2.0])
    adapted = base_of(model)
    model.fuse_lora(lora_scale=0.7)
    assert changed(base_of(model), adapted)
    model.set_adapters(["a", "b"], [1.5, -1.0])
    model.unfuse_lora()
    assert_same(base_of(model), adapted)
    model.fuse_lora(adapter_names=["a"])
    model.set_adapters(["a"], [0.1])
    model.fuse_lora(adapter_names=["b"])
    model.delete_adapters(["a", "b"])
    found = {name.replace("base_layer.", ""): value for name, value in base_of(model).items()}
    assert_same(found, before)


@pytest.mark.parametrize("order", ["WaRA around LoRA", "LoRA around WaRA"])
def test_with_an_adapter_of_another_method_around_the_layer(order):
    """LoRA subtracts what it has added, so here the base is back up to rounding."""
    base = Chain().double()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    configs = {"WaRA": WaRAConfig(init_weights=False, target_modules=r"layers\.\d"), "LoRA": None}
    configs["LoRA"] = LoraConfig(init_lora_weights=False, target_modules=r"layers\.\d")
    outer, _, inner = order.split()
    model = get_peft_model(inject_adapter_in_model(configs[inner], base, "a"), configs[outer], "a").double()
    x = torch.randn(2, 8, dtype=torch.float64)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    if order == "LoRA around WaRA":  # LoRA was merged first, and is unmerged first by its own model
        with pytest.raises(ValueError, match="in the reverse order of merging"):
            model.unmerge_adapter()
        return
    model.unmerge_adapter()
    found = {name.replace("base_layer.", ""): value for name, value in model.base_model.model.state_dict().items()}
    for name, value in before.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5), (64, 4096), (1000, 77), (7,), (0, 4)])
def test_a_seal_sees_any_change_of_bits_and_no_move(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(shape, generator=generator) * 10).to(dtype)
    seal = Seal([tensor])
    assert seal.is_on([tensor.clone()])
    assert seal.is_on([torch.cat([tensor[:1], tensor])[1:]])  # elsewhere in memory
    assert not seal.is_on([tensor.to(torch.float16)])
    if tensor.numel() == 0:
        return
    changes = [tensor.roll(1, 0), tensor.flip(0), tensor.roll(1, -1), tensor.flip(-1), -tensor]
    for index in (0, tensor.numel() // 2, -1):
        changes.append(tensor.clone())
        changes[-1].view(-1)[index] += 1
    assert not any(seal.is_on([change]) for change in changes)
