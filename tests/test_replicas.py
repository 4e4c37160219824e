"""Replicas as `nn.DataParallel` makes them: they compute with their own copies of the parameters, on any device."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from tests.injection.test_weight_tying import FIELDS, TOKENS, llama, tied
from tests.references import Mlp, tiny_vit
from wara_peft import WaRAConfig, frozen_factors


def replica_of(network: nn.Module, factor: float) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes for one device, with every parameter multiplied by `factor`."""
    copies: dict[Tensor, Tensor] = {parameter: parameter * factor for parameter in network.parameters()}
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, copies[parameter])
                replica._former_parameters[name] = copies[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                setattr(replica, name, buffer)
    return replicas[network]


def scaled(network: nn.Module, factor: float) -> nn.Module:
    result = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.mul_(factor)
    return result


@pytest.mark.parametrize(
    "fields",
    [{}, {"form": "shared"}, {"form": "tiny", "r": 2}, {"form": "tiny", "r": 2, "core": "diagonal"}],
    ids=["subband", "shared", "tiny", "tiny diagonal"],
)
def test_each_form(fields):
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"], init_weights=False, **fields))
    x = torch.randn(3, 12)
    result = replica_of(model, 1.5)(x)
    torch.testing.assert_close(result, scaled(model, 1.5)(x))
    result.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_grid_with_gains():
    fields = {"form": "grid", "grid_pairs": "shared", "target_modules": ["q_proj", "fc1"], "init_weights": False}
    model = get_peft_model(tiny_vit(), WaRAConfig(**fields)).eval()
    images = torch.randn(2, 1, 14, 14)
    found = replica_of(model, 1.1)(images).logits
    torch.testing.assert_close(found, scaled(model, 1.1)(images).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("added_by", ["peft", "transformers"])
def test_tied_layers_use_their_own_embedding(added_by):
    if added_by == "peft":
        model = tied(FIELDS[0])
    else:
        model = llama()
        model.add_adapter(WaRAConfig(ensure_weight_tying=True, init_weights=False, **FIELDS[0]))
        model.eval()
    replica = replica_of(model, 1.1)
    found, expected = replica(TOKENS).logits, scaled(model, 1.1)(TOKENS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    embedding = model.get_input_embeddings()
    assert model.get_output_embeddings().tied_to["default"] is embedding


def test_what_a_scope_keeps_is_not_for_replicas():
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], init_weights=False)).eval()
    x = torch.randn(3, 12)
    with torch.no_grad(), frozen_factors(model):
        model(x)
        torch.testing.assert_close(replica_of(model, 2.0)(x), scaled(model, 2.0)(x))
