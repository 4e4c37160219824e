"""A model whose adapter is changed while it generates computes with the new values from the next token on.

Each way to change a parameter that PyTorch has is tried, and each place from which `generate` can be interrupted.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.test_generation import NEW_TOKENS, PROMPT, adapted, generate, llama
from wara_peft import WaRAConfig
from wara_peft.forms import SubbandFactor


class Changing:
    """Changes the model in the middle of its own generation, once, from wherever `generate` calls this."""

    def __init__(self, model: nn.Module, change) -> None:
        self.model, self.change, self.step = model, change, 0

    def __call__(self, *_: object) -> None:
        self.step += 1
        if self.step == 5:
            torch.manual_seed(9)
            self.change(self.model)


class Processor(Changing, LogitsProcessor):
    def __call__(self, input_ids, scores):
        super().__call__()
        return scores


class Criterion(Changing, StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        super().__call__()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer(Changing, BaseStreamer):
    put = Changing.__call__

    def end(self) -> None:
        pass


class InAnotherThread(Processor):
    """Changes the model in another thread, while `generate` waits."""

    def __init__(self, model: nn.Module, change) -> None:
        super().__init__(model, lambda model: _in_thread(change, model))


def _in_thread(function, *args) -> None:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


PLACES = {
    Processor: lambda place: {"logits_processor": LogitsProcessorList([place])},
    InAnotherThread: lambda place: {"logits_processor": LogitsProcessorList([place])},
    Criterion: lambda place: {"stopping_criteria": StoppingCriteriaList([place])},
    Streamer: lambda place: {"streamer": place},
}


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Parameters of adapters, with the module that has each and its name there."""
    for name, module in model.named_modules():
        if "wara_" in name:
            yield from ((module, child, parameter) for child, parameter in module.named_parameters(recurse=False))


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, _, parameter in _owners(model)]


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in _parameters(model):
            parameter.mul_(-1.5)


def in_place_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        for parameter in _parameters(model):
            parameter.add_(0.5)


def by_copy(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in _parameters(model):
            parameter.copy_(torch.randn_like(parameter))


def detached(model: nn.Module) -> None:
    for parameter in _parameters(model):
        parameter.detach()[0] = 2.0


def for_each(model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_mul_(_parameters(model), -1.5)


def replaced(model: nn.Module) -> None:
    for module, name, parameter in list(_owners(model)):
        setattr(module, name, nn.Parameter(torch.randn_like(parameter)))


def swapped(model: nn.Module) -> None:
    for parameter in _parameters(model):
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.randn_like(parameter)))


def other_storage(model: nn.Module) -> None:
    values = torch.randn(sum(parameter.numel() for parameter in _parameters(model)))
    torch.nn.utils.vector_to_parameters(values, _parameters(model))


def loaded(model: nn.Module, assign: bool = False) -> None:
    state = {name: torch.randn_like(p) for name, p in model.named_parameters() if "wara_" in name}
    model.load_state_dict(state, strict=False, assign=assign)


def assigned(model: nn.Module) -> None:
    loaded(model, assign=True)


def cast(model: nn.Module) -> None:
    model.double()


def rounded(model: nn.Module) -> None:
    """The parameters may well have their old addresses after this."""
    for module, _, _ in list(_owners(model)):
        module.bfloat16().float()


def stepped(model: nn.Module, make=torch.optim.AdamW, **options) -> None:
    """A step with gradients that no forward of the model has made."""
    optimizer = make(_parameters(model), lr=0.5, **options)
    for parameter in _parameters(model):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def stepped_for_each(model: nn.Module) -> None:
    stepped(model, foreach=True)


def stepped_fused(model: nn.Module) -> None:
    stepped(model, fused=True)


def stepped_fused_sgd(model: nn.Module) -> None:
    stepped(model, torch.optim.SGD, fused=True)


def trained(model: nn.Module) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(_parameters(model), lr=5.0)
        model.base_model.model(input_ids=PROMPT, labels=PROMPT).loss.backward()
        optimizer.step()


def trained_unseen(model: nn.Module) -> None:
    """Write as DeepSpeed's optimizers do."""
    with torch.enable_grad():
        model.base_model.model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    for parameter in _parameters(model):
        parameter.data.add_(parameter.grad, alpha=-5.0)


def written_unseen_but_told(model: nn.Module) -> None:
    for parameter in _parameters(model):
        parameter.data.mul_(-1.5)
    torch.autograd.graph.increment_version(_parameters(model))


CHANGES = [
    in_place,
    in_place_in_inference_mode,
    by_copy,
    detached,
    for_each,
    replaced,
    swapped,
    other_storage,
    loaded,
    assigned,
    cast,
    rounded,
    stepped,
    stepped_for_each,
    stepped_fused,
    stepped_fused_sgd,
    trained,
    trained_unseen,
    written_unseen_but_told,
]


def _logits(model: nn.Module, place: type[Changing], change) -> torch.Tensor:
    """Logits of a generate in whose middle the model changes; (tokens, batch, vocabulary)."""
    arguments = PLACES[place](place(model, change))
    found = generate(model, output_logits=True, return_dict_in_generate=True, **arguments)
    return torch.stack([logits.double() for logits in found.logits])


def _unkept(monkeypatch, model: nn.Module, place: type[Changing], change) -> torch.Tensor:
    """Results of a model that synthesises every factor in every forward."""
    monkeypatch.setattr(SubbandFactor, "forward", lambda self: self.synthesise())
    return _logits(model, place, change)


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_while_it_generates_is_never_stale(change, monkeypatch):
    found = _logits(adapted(), Processor, change)
    unchanged = _logits(adapted(), Processor, lambda model: None)
    expected = _unkept(monkeypatch, adapted(), Processor, change)
    torch.testing.assert_close(found, expected)
    assert change is cast or (expected - unchanged)[5:].abs().max() > 1e-4


@pytest.mark.parametrize("change", [in_place, replaced, assigned, stepped_for_each, stepped_fused])
@pytest.mark.parametrize("place", [place for place in PLACES if place is not Processor])
def test_wherever_it_is_changed(place, change, monkeypatch):
    found = _logits(adapted(), place, change)
    torch.testing.assert_close(found, _unkept(monkeypatch, adapted(), place, change))


def test_another_model_that_is_evaluated_inside_and_changes_is_never_stale(syntheses):
    model, other = adapted(), adapted()
    errors = []

    class Evaluating(LogitsProcessor):
        def __call__(self, input_ids, scores):
            with torch.no_grad():
                found = other.base_model.model(input_ids=PROMPT).logits
                fresh = copy.deepcopy(other.base_model.model)
                errors.append((found - fresh(input_ids=PROMPT).logits).abs().max())
                in_place(other)
            return scores

    generate(model, logits_processor=LogitsProcessorList([Evaluating()]))
    assert len(errors) == NEW_TOKENS
    assert max(errors) == 0  # of the same operations
    assert {syntheses[factor] for factor in model.modules() if isinstance(factor, SubbandFactor)} == {2}


def test_parameters_without_a_version_are_never_kept(syntheses):
    with torch.inference_mode():
        model = adapted()
        found = generate(model)
    assert set(syntheses.values()) == {NEW_TOKENS}
    with torch.inference_mode():
        assert torch.equal(found, generate(model.merge_and_unload().eval()))


def test_parametrized_parameters_are_never_kept(syntheses):
    class Negative(nn.Module):
        def forward(self, weight):
            return -weight

    model = adapted()
    for factor in [module for module in model.modules() if isinstance(module, SubbandFactor)]:
        parametrize.register_parametrization(factor, "level1", Negative())
    generate(model)
    assert set(syntheses.values()) == {NEW_TOKENS}


def test_parameters_that_are_sharded_are_never_kept(syntheses):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = adapted()
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        generate(model)
    finally:
        dist.destroy_process_group()
    assert set(syntheses.values()) == {NEW_TOKENS}


def test_vmap_over_adapters():
    config = WaRAConfig(target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(llama(), config).eval()
    states = [{name: torch.randn_like(p) for name, p in model.named_parameters() if "wara_" in name} for _ in "ab"]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}

    def logits(state):
        return torch.func.functional_call(model, state, kwargs={"input_ids": PROMPT, "use_cache": False}).logits

    with torch.no_grad():
        found = torch.vmap(logits)(stacked)
        expected = torch.stack([logits(state) for state in states])
    torch.testing.assert_close(found, expected)
