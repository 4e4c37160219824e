"""Reparametrised LoRA whose parameters are empty between uses, as DeepSpeed's stage 3 leaves them."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.references import Mlp
from wara_peft import plain_lora, reparametrize_lora

INPUTS = torch.randn(5, 12, dtype=torch.float64)
FACTORS = [f"base_model.model.{layer}.lora_{side}.default" for layer in ("up", "down") for side in "AB"]


class GatheredParameters:
    """What `deepspeed.zero.GatheredParameters` does in one process.

    Attributes:
        entered: number of scopes that have been entered.
    """

    entered = 0

    def __init__(
        self, params: Iterable[nn.Parameter], modifier_rank: int | None = None, fwd_module: Any = None
    ) -> None:
        self.params, self.modifier_rank = list(params), modifier_rank

    def __enter__(self) -> None:
        GatheredParameters.entered += 1
        for parameter in self.params:
            assert not parameter.numel(), "DeepSpeed would scatter at the end what an outer scope has gathered"
            parameter.data = parameter.ds_tensor.clone()

    def __exit__(self, *_: Any) -> None:
        for parameter in self.params:
            if self.modifier_rank is not None:
                parameter.ds_tensor = parameter.data.clone()
            parameter.data = parameter.data.new_empty(0)


@pytest.fixture
def stage3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    deepspeed = ModuleType("deepspeed")
    deepspeed.zero = ModuleType("deepspeed.zero")  # type: ignore[attr-defined]
    deepspeed.zero.GatheredParameters = GatheredParameters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setattr("peft.utils.integrations.check_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(GatheredParameters, "entered", 0)
    yield


def made(seed: int = 0, reparametrized: bool = True, **fields: Any) -> PeftModel:
    torch.manual_seed(100)
    base = Mlp().double()
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=9, target_modules=["up", "down"], **fields))
    if reparametrized:
        reparametrize_lora(model, wavelet="db2")
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return model


def partitioned(model: PeftModel) -> PeftModel:
    """Empty all parameters of the adapter. The module that owns one has it in its own forward, and in no other's."""
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        for parameter in own:
            parameter.ds_shape, parameter.ds_tensor = parameter.shape, parameter.data
            parameter.data = parameter.data.new_empty(0)
        if own:
            scope = GatheredParameters(own)
            module.register_forward_pre_hook(lambda *_, scope=scope: scope.__enter__())
            module.register_forward_hook(lambda *_, scope=scope: scope.__exit__())
    return model


def weights(model: PeftModel) -> dict[str, Tensor]:
    plain_lora(model)
    return {name: model.get_submodule(name).weight.detach() for name in FACTORS}


def whole(model: PeftModel) -> GatheredParameters:
    return GatheredParameters([parameter for parameter in model.parameters() if parameter.requires_grad], 0)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_is_described_without_gathering(stage3, grad):
    model, expected = partitioned(made()), weights(made())
    with torch.set_grad_enabled(grad):
        for name, value in expected.items():
            weight = model.get_submodule(name).weight
            for attribute in ("dtype", "shape", "device", "ndim", "requires_grad", "is_floating_point", "numel"):
                found, wanted = getattr(weight, attribute), getattr(value.requires_grad_(), attribute)
                assert (found() if callable(found) else found) == (wanted() if callable(wanted) else wanted), attribute
    assert GatheredParameters.entered == 0


def test_the_values_of_a_weight_are_gathered(stage3):
    model, expected = partitioned(made()), weights(made())
    for name, value in expected.items():
        close(model.get_submodule(name).weight.detach() + 0, value)
    assert GatheredParameters.entered >= 4
    assert not any(parameter.numel() for name, parameter in model.named_parameters() if "level" in name)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "lora_dropout": 0.3}, {"lora_bias": True}])
def test_it_trains_as_if_it_were_whole(stage3, fields):
    model, expected = partitioned(made(**fields)), made(**fields)
    for each in (model, expected):
        torch.manual_seed(7)
        loss = each(INPUTS).square().mean()
        if each is model:
            with whole(model):
                loss.backward()
        else:
            loss.backward()
    grads = {name: parameter.grad for name, parameter in expected.named_parameters()}
    assert sum(grad is not None for grad in grads.values()) >= 4
    for name, parameter in model.named_parameters():
        close(parameter.grad, grads[name])


def test_a_write_reaches_what_is_kept(stage3):
    model, others = partitioned(made()), weights(made(3))
    for name, value in others.items():
        model.get_submodule(name).weight.data.copy_(value)
    with torch.no_grad():
        close(model(INPUTS), made(3)(INPUTS))
    with pytest.raises(ValueError, match=r"down.lora_B.default' cannot become this one: it is not in the span"):
        model.get_submodule(FACTORS[-1]).weight.data.add_(torch.randn(12, 9, dtype=torch.float64))
    with torch.no_grad():
        close(model(INPUTS), made(3)(INPUTS))


def test_a_state_dict_has_empty_weights_as_that_of_plain_lora_has(stage3):
    model, plain = partitioned(made()), partitioned(made(reparametrized=False))
    state, expected = model.state_dict(), plain.state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
    assert GatheredParameters.entered == 0
    other = partitioned(made(3))
    for each in (state, expected):  # DeepSpeed loads such a state, and then its own partitions
        other.load_state_dict(each)
    with torch.no_grad():
        close(other(INPUTS), made(3)(INPUTS))


def test_whole_weights_are_not_loaded_into_empty_ones(stage3):
    model, state = partitioned(made()), made(3).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model.model.up.lora_A.default"):
        model.load_state_dict(state)
    with torch.no_grad():
        close(model(INPUTS), made()(INPUTS))


def test_a_state_is_loaded_and_saved_where_all_is_gathered(stage3, tmp_path):
    model = partitioned(made())
    with whole(model):
        model.load_state_dict(made(3).state_dict())
        state = model.state_dict()
        model.save_pretrained(tmp_path / "gathered")
    with torch.no_grad():
        close(model(INPUTS), made(3)(INPUTS))
    close(
        {key: value for key, value in state.items() if "lora_" in key},
        {f"{n}.weight": v for n, v in weights(made(3)).items()},
    )
    # DeepSpeed puts a state dict together from parameters, by their names.
    named = {name: getattr(parameter, "ds_tensor", parameter.data) for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "named", state_dict=named)
    for saved in ("gathered", "named"):
        loaded = PeftModel.from_pretrained(made(reparametrized=False).unload(), tmp_path / saved)
        close(loaded(INPUTS), made(3)(INPUTS))


def test_coefficients_by_name_are_loaded(stage3):
    model = made()
    model.load_state_dict({name: parameter.detach() for name, parameter in made(3).named_parameters()})
    close(model(INPUTS), made(3)(INPUTS))


def test_some_coefficients_only_are_refused_as_missing():
    model, before = made(), made()(INPUTS)
    state = {name: parameter.detach() for name, parameter in made(3).named_parameters() if "level" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*up.lora_A.default.weight"):
        model.load_state_dict(state)
    close(model(INPUTS), before)


@pytest.mark.parametrize("reparametrized", [True, False])
def test_the_state_of_a_frozen_adapter_is_a_plain_one_once_it_is_saved(reparametrized, tmp_path):
    model = made(reparametrized=reparametrized).requires_grad_(False)
    state = model.state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for each in (loaded, copy.deepcopy(state)):
        assert type(each) is OrderedDict
        assert each._metadata.keys() >= {"", "base_model.model.up"}
        assert vars(each).keys() == {"_metadata"}
        close(dict(each), dict(state))
    assert model.state_dict(destination={}).keys() == state.keys()
    for name, _ in model.named_parameters():
        state.pop(name)
    assert not state
    with pytest.raises(KeyError):
        state.pop("another")


def test_a_partition_is_neither_reparametrized_nor_made_plain(stage3):
    with pytest.raises(
        ValueError, match=r"lora_A of 'base_model.model.up' is sharded; reparametrise the model before"
    ):
        reparametrize_lora(partitioned(made(reparametrized=False)))
    model = partitioned(made())
    with pytest.raises(ValueError, match=r"up.lora_A.default' is sharded, so it cannot get a plain weight"):
        plain_lora(model)
    with torch.no_grad():
        close(model(INPUTS), made()(INPUTS))


def test_a_part_that_cannot_be_gathered_is_not_taken_for_the_whole(monkeypatch):
    model, others = partitioned(made()), weights(made(3))
    layer = model.get_submodule(FACTORS[0])
    for function in (lambda: layer.weight + 1, lambda: layer.weight.data.copy_(others[FACTORS[0]])):
        with pytest.raises(
            RuntimeError, match=r"up.lora_A.default' is computed from coefficients of which this process"
        ):
            function()
