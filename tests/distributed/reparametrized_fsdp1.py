"""Cases of reparametrised LoRA under FSDP1 and DDP. Each case gets a directory that both processes share."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.reparametrized_models import (
    FROM_FIRST,
    FULL,
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


def flat(model: PeftModel) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1_gets_and_sets_states(directory: Path) -> None:
    for kind, config in (
        (StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)),
        (StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)),
        (StateDictType.SHARDED_STATE_DICT, None),
    ):
        model, other = flat(made(2)), flat(made(1))
        with FullyShardedDataParallel.state_dict_type(model, kind, config):
            state = model.state_dict()
        if kind is StateDictType.FULL_STATE_DICT and (dist.get_rank() == 0 or not config.rank0_only):
            weights = {key: value for key, value in state.items() if "level" not in key}
            assert_close(weights, dict(plain_lora_of(made(2)).state_dict()))
            made(1).save_pretrained(directory / f"{config.rank0_only} {dist.get_rank()}", state_dict=state)
            adapter = directory / f"{config.rank0_only} {dist.get_rank()}"
            assert_close(output(PeftModel.from_pretrained(plain().unload(), adapter)), output(made(2)))
        if config is None or not config.rank0_only:
            with FullyShardedDataParallel.state_dict_type(other, kind, config):
                other.load_state_dict(state)
            assert_close(output(other), output(made(2)))


def fsdp1_states_by_the_checkpoint_module(directory: Path) -> None:
    state = get_model_state_dict(flat(made(2)), options=FULL)
    assert_close(
        {key: value for key, value in state.items() if "level" not in key}, dict(plain_lora_of(made(2)).state_dict())
    )
    model = flat(made(1))
    set_model_state_dict(model, state, options=FULL)
    assert_close(output(model), output(made(2)))


def fsdp1_takes_plain_lora(directory: Path) -> None:
    model = flat(made(1))
    kind, config = StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(model, kind, config):
        model.load_state_dict(plain_lora_of(made(2)).state_dict(), strict=False)
    assert_close(output(model), output(made(2)))


def fsdp1_refuses_what_needs_the_whole(directory: Path) -> None:
    model = flat(made())
    before = output(model)
    layer = model.module.base_model.model.up.lora_A["default"]
    assert (layer.weight.dtype, layer.weight.shape) == (torch.float64, (9, 12))
    value = in_span()["base_model.model.up.lora_A.default.weight"]
    for function in (lambda: layer.weight + 1, lambda: layer.weight.data.copy_(value), lambda: layer.write(value)):
        try:
            function()
        except RuntimeError as error:
            assert "summon_full_params" in str(error)
        else:
            raise AssertionError("a part was taken for the whole")
    assert_close(output(model), before)
    with FullyShardedDataParallel.summon_full_params(model):
        layer.weight.data.copy_(value)
        assert_close(layer.weight.detach() + 0, value)
    expected = made()
    expected.base_model.model.up.lora_A["default"].weight.data.copy_(value)
    assert_close(output(model), output(expected))


def what_fsdp1_shards_is_neither_reparametrized_nor_made_plain(directory: Path) -> None:
    assert_sharded_is_refused(flat, lambda model: model.module)


def fsdp1_with_the_policy_of_peft(directory: Path) -> None:
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Linear"
    device = torch.device("cpu")
    model, expected = made(), made()
    policy = fsdp_auto_wrap_policy(model)
    try:
        FullyShardedDataParallel(made(), auto_wrap_policy=policy, use_orig_params=False, device_id=device)
    except ValueError as error:
        assert "uniform `requires_grad`" in str(error)
    else:
        raise AssertionError("frozen and trained parameters became one")
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    train(wrapped, optimizer_of(wrapped), 3)
    train(expected, optimizer_of(expected), 3, processes=1)
    assert_close(output(wrapped), output(expected))


def ddp_states(directory: Path) -> None:
    model, state = DistributedDataParallel(made(2)), plain_lora_of(made(2)).state_dict()
    assert_close(dict(model.state_dict()), {f"module.{key}": value for key, value in state.items()})
    assert_close(get_model_state_dict(model), dict(state))
    other = DistributedDataParallel(made(1))
    other.load_state_dict(model.state_dict())
    assert_loaded(other.module, made(2))
    third = DistributedDataParallel(made(1))
    set_model_state_dict(third.module, copy.copy(state))
    assert_loaded(third.module, made(2))
    fourth = DistributedDataParallel(made(1))
    set_model_state_dict(
        fourth.module, {} if dist.get_rank() else dict(state), options=replace(FROM_FIRST, strict=False)
    )
    assert_loaded(fourth.module, made(2))


CASES = [
    fsdp1_gets_and_sets_states,
    fsdp1_states_by_the_checkpoint_module,
    fsdp1_takes_plain_lora,
    fsdp1_refuses_what_needs_the_whole,
    what_fsdp1_shards_is_neither_reparametrized_nor_made_plain,
    fsdp1_with_the_policy_of_peft,
    ddp_states,
]
