"""Cases of reparametrised LoRA that FSDP2 shards. Each case gets a directory that both processes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from peft import PeftModel, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
)

from tests.distributed.reparametrized_models import (
    FROM_FIRST,
    FULL,
    INPUTS,
    assert_close,
    assert_loaded,
    assert_sharded_is_refused,
    in_span,
    made,
    optimizer_of,
    output,
    plain,
    plain_lora_of,
    train,
)
from wara_peft.lora.reparametrized_layers import ReparametrizedLayer

MESHES = {"one axis": (2,), "replicas": (2, 1), "replicas of one": (1, 2)}


def sharded(model: PeftModel, mesh: str = "one axis") -> Any:
    sizes = MESHES[mesh]
    names = ("replicate", "shard")[-len(sizes) :]
    axes = dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=names)
    for layer in ("up", "down"):
        fully_shard(model.base_model.model.get_submodule(layer), mesh=axes)
    return fully_shard(model, mesh=axes)


def full_state_is_lora(directory: Path) -> None:
    for mesh in MESHES:
        state = get_model_state_dict(sharded(made(), mesh), options=FULL)
        assert_close(state, dict(plain_lora_of(made()).state_dict()))


def sharded_state_is_sharded_as_lora_is(directory: Path) -> None:
    for mesh in MESHES:
        found = get_model_state_dict(sharded(made(), mesh))
        expected = get_model_state_dict(sharded(plain_lora_of(made()), mesh))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key].placements, found[key].device_mesh) == (value.placements, value.device_mesh), key
            assert_close(found[key].to_local(), value.to_local())


def full_state_is_set(directory: Path) -> None:
    for mesh in MESHES:
        for options in (FULL, FROM_FIRST, replace(FROM_FIRST, strict=False)):
            model = sharded(made(1), mesh)
            state = made(2).state_dict() if dist.get_rank() == 0 or options is FULL else {}
            set_model_state_dict(model, state, options=options)
            assert_loaded(model, made(2))


def sharded_state_is_saved_and_set(directory: Path) -> None:
    for mesh in MESHES:
        dcp.save({"model": get_model_state_dict(sharded(made(2), mesh))}, checkpoint_id=directory / mesh)
        for other in MESHES:
            model = sharded(made(1), other)
            state = get_model_state_dict(model)
            dcp.load({"model": state}, checkpoint_id=directory / mesh)
            set_model_state_dict(model, state)
            assert_loaded(model, made(2))


def checkpoints_go_between_plain_and_reparametrized(directory: Path) -> None:
    builders: tuple[Callable[[int], PeftModel], ...] = (lambda seed: plain_lora_of(made(seed)), made)
    for number, (saved, loaded) in enumerate((builders, builders[::-1])):
        dcp.save({"model": get_model_state_dict(sharded(saved(2)))}, checkpoint_id=directory / str(number))
        model = sharded(loaded(1))
        state = get_model_state_dict(model)
        dcp.load({"model": state}, checkpoint_id=directory / str(number))
        set_model_state_dict(model, state)
        assert_loaded(model, loaded(2))


def training_resumes_from_full_and_sharded_states(directory: Path) -> None:
    expected = made()
    train(expected, optimizer_of(expected), 5, processes=1)
    for name, options in (("sharded", None), ("full", FULL), ("first", FROM_FIRST)):
        model = sharded(made())
        optimizer = optimizer_of(model)
        train(model, optimizer, 3)
        states = get_state_dict(model, optimizer, options=options)
        assert not any("level" in key for key in states[0])
        resumed = sharded(made(1))
        again = optimizer_of(resumed)
        if options is None:
            dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=directory / name)
            states = get_state_dict(resumed, again)
            dcp.load(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=directory / name)
        elif options is FROM_FIRST and dist.get_rank():
            states = ({}, {})
        set_model_state_dict(resumed, states[0], options=options)
        set_optimizer_state_dict(resumed, again, states[1], options=options)
        train(resumed, again, 2)
        assert_loaded(resumed, expected)


def weights_outside_of_the_span_are_refused(directory: Path) -> None:
    model = sharded(made())
    before = output(model)
    state = in_span()
    last = "base_model.model.down.lora_B.default.weight"
    state[last] = torch.randn(state[last].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for options in (FULL, FROM_FIRST, StateDictOptions()):
        given = dict(state) if dist.get_rank() == 0 or options is not FROM_FIRST else {}
        try:
            set_model_state_dict(model, given, options=replace(options, strict=False))
        except ValueError as error:
            assert "down.lora_B.default" in str(error)
            assert "not in the span" in str(error)
        else:
            raise AssertionError("the weights were taken")
        assert_close(output(model), before)


def weights_are_read_and_written_outside_of_the_forward(directory: Path) -> None:
    model, expected = sharded(made()), made()
    for each in (model, expected):
        layers = [each.get_submodule(key.removesuffix(".weight")) for key in in_span()]
        sum(layer.weight.pow(4).sum() for layer in layers).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 4
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            assert_close(grads[name].full_tensor(), parameter.grad)
    for each in (model, expected):
        for key, value in in_span().items():
            each.get_submodule(key.removesuffix(".weight")).weight.data.copy_(value)
    assert_loaded(model, expected)
    assert_close(output(model), output(made(3)))


def what_is_sharded_is_neither_reparametrized_nor_made_plain(directory: Path) -> None:
    assert_sharded_is_refused(sharded, lambda model: model)


def accelerate_shards_on_the_meta_device_and_loads(directory: Path) -> None:
    model = made(2)
    state = model.state_dict()
    model = sharded(model.to("meta"))
    first = dist.get_rank() == 0
    fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=first), model, state if first else {})
    assert_loaded(model, made(2))
    train(model, optimizer_of(model), 1)
    expected = made(2)
    train(expected, optimizer_of(expected), 1, processes=1)
    assert_loaded(model, expected)


def first_process_saves_plain_lora(directory: Path) -> None:
    model = sharded(made(2))
    state = get_model_state_dict(model, options=FULL)
    of_adapter = get_peft_model_state_dict(model)
    if dist.get_rank() == 0:
        model.save_pretrained(directory / "adapter", state_dict=state)
        base = plain().unload()
        assert_close(output(PeftModel.from_pretrained(base, directory / "adapter")), output(made(2)))
    expected = get_peft_model_state_dict(plain_lora_of(made(2)))
    assert_close({key: value.full_tensor() for key, value in of_adapter.items()}, expected)


def states_leave_out_a_frozen_adapter(directory: Path) -> None:
    model, expected = made(), plain_lora_of(made())
    for each in (model, expected):
        each.add_adapter("ref", each.peft_config["default"])  # as TRL makes the reference of DPO
    options = replace(FULL, ignore_frozen_params=True)
    found, wanted = (get_model_state_dict(sharded(each), options=options) for each in (model, expected))
    assert isinstance(model.get_submodule("base_model.model.up.lora_A.ref"), ReparametrizedLayer)
    assert len(found) == 4
    assert_close(found, wanted)


def fsdp2_casts_to_a_narrower_dtype(directory: Path) -> None:
    model = made().float()
    for layer in ("up", "down"):
        fully_shard(
            model.base_model.model.get_submodule(layer), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        )
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    dtypes = []
    layer = model.base_model.model.up
    layer.lora_A["default"].register_forward_pre_hook(lambda *_: dtypes.append(layer.lora_A["default"].weight.dtype))
    found, expected = output(model, INPUTS.float()), output(plain_lora_of(made().bfloat16()), INPUTS.bfloat16())
    assert (dtypes, found.dtype) == ([torch.bfloat16], torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert get_model_state_dict(model)["base_model.model.up.lora_A.default.weight"].dtype == torch.float32


CASES = [
    states_leave_out_a_frozen_adapter,
    full_state_is_lora,
    sharded_state_is_sharded_as_lora_is,
    full_state_is_set,
    sharded_state_is_saved_and_set,
    checkpoints_go_between_plain_and_reparametrized,
    training_resumes_from_full_and_sharded_states,
    weights_outside_of_the_span_are_refused,
    weights_are_read_and_written_outside_of_the_forward,
    what_is_sharded_is_neither_reparametrized_nor_made_plain,
    accelerate_shards_on_the_meta_device_and_loads,
    first_process_saves_plain_lora,
    fsdp2_casts_to_a_narrower_dtype,
]
