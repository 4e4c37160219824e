"""Within one `generate` factors are synthesised twice at most; nothing outlives it, and nothing is ever stale."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

from tests import models
from wara_peft import WaRAConfig, frozen_factors
from wara_peft.forms.factor_cache import _call, factors_of_one_call

PROMPT = torch.arange(1, 7).view(2, 3)
NEW_TOKENS = 12


def llama() -> nn.Module:
    return models.llama(eos_token_id=None)


def adapted(task_type: str | None = "CAUSAL_LM", **fields) -> PeftModel:
    config = WaRAConfig(target_modules="all-linear", init_weights=False, task_type=task_type, **fields)
    return get_peft_model(llama(), config).eval()


def generate(model: nn.Module, **more) -> torch.Tensor:
    return model.generate(input_ids=PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, **more)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_factors_are_synthesised_twice(task_type, mode, syntheses):
    model = adapted(task_type).train(mode == "train")
    found = generate(model)
    assert len(syntheses) == 2 * 14
    assert set(syntheses.values()) == {2}
    merged = model.merge_and_unload().eval()
    assert torch.equal(found, generate(merged))


@pytest.mark.parametrize("fields", [{"form": "shared"}, {"form": "tiny", "r": 2}, {"wavelet": "db2", "levels": 2}])
@pytest.mark.filterwarnings("ignore:levels=")
def test_other_forms(fields, syntheses):
    model = adapted(**fields)
    generate(model)
    assert set(syntheses.values()) == {2}


@pytest.mark.parametrize("grad", [True, False])
def test_a_plain_forward_keeps_nothing(grad, syntheses):
    model = adapted()
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            model(input_ids=PROMPT)
    assert set(syntheses.values()) == {3}


def test_reentrant_checkpointing_trains_as_without():
    grads = []
    for use in (False, True):
        model = adapted().train()
        if use:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        model(input_ids=PROMPT, labels=PROMPT).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_layer_that_is_called_twice_in_a_checkpoint_is_not_constant():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return checkpoint(lambda x: self.layer(torch.tanh(self.layer(x))), x, use_reentrant=True)

    model = get_peft_model(Twice(), WaRAConfig(target_modules=["layer"], init_weights=False))
    x = torch.randn(3, 6, requires_grad=True)
    model(x).sum().backward()
    layer = model.base_model.model.layer
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    model.zero_grad()
    layer(torch.tanh(layer(x))).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad)


def test_nothing_is_kept_after_an_exception():
    model = adapted()
    kept: list[weakref.ref] = []

    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            call = _call.get()
            tensors = [made.tensor for made in call.made.values() if made.tensor is not None]
            if tensors:
                kept.extend(map(weakref.ref, tensors))
                raise RuntimeError("half way")
            return scores

    with pytest.raises(RuntimeError, match="half way"):
        generate(model, logits_processor=LogitsProcessorList([Failing()]))
    gc.collect()
    assert kept
    assert all(reference() is None for reference in kept)
    assert _call.get() is None


class Words:
    """Enough of a tokenizer for a streamer."""

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, ids)) + " "


def test_a_stream_that_is_left_half_way():
    model = adapted()
    expected = generate(model)[:1]
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    arguments = {"input_ids": PROMPT[:1], "max_new_tokens": NEW_TOKENS, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    next(streamer)
    assert _call.get() is None  # the scope is the thread's own
    with torch.no_grad():
        model(input_ids=PROMPT)
    thread.join()
    assert torch.equal(generate(model)[:1], expected)


def test_the_users_scope_goes_on_refusing_gradients(syntheses):
    model = adapted()
    with torch.no_grad(), frozen_factors(model):
        generate(model)
        assert set(syntheses.values()) == {1}
        with torch.enable_grad(), pytest.raises(RuntimeError, match="frozen_factors the factors are constants"):
            model(input_ids=PROMPT)


def test_mixed_batches_and_beams(syntheses):
    model = adapted()
    model.add_adapter("other", WaRAConfig(target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM"))
    model.generate(input_ids=PROMPT, max_new_tokens=NEW_TOKENS, num_beams=2, adapter_names=["default", "other"])
    assert set(syntheses.values()) == {2}


class Operations(TorchDispatchMode):
    """How many operations of ATen run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def _cost(layer: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Calls of Python functions and operations of ATen in one forward of a layer."""
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event == "call"

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        layer(x)
    finally:
        sys.setprofile(previous)
    with Operations() as operations:
        layer(x)
    return calls, operations.count


def _costs_no_more(layer: nn.Module, of_lora: nn.Module, x: torch.Tensor) -> None:
    (calls, operations), (loras_calls, loras_operations) = _cost(layer, x), _cost(of_lora, x)
    inlined = sys.version_info >= (3, 12)  # the comprehension in LoRA's forward, which was a call
    assert calls <= loras_calls + inlined
    assert operations <= loras_operations


@pytest.mark.parametrize("fields", [{}, {"wavelet": "db4", "levels": 3}, {"form": "shared"}])
@pytest.mark.filterwarnings("ignore:levels=")
def test_a_layer_with_kept_factors_costs_a_token_no_more_than_loras(fields):
    x = torch.randn(1, 1, 16)
    lora = get_peft_model(llama(), LoraConfig(r=16, target_modules=["q_proj"])).eval()
    model = get_peft_model(llama(), WaRAConfig(target_modules=["q_proj"], **fields)).eval()
    of_lora, layer = (each.base_model.model.model.layers[0].self_attn.q_proj for each in (lora, model))
    with torch.no_grad(), factors_of_one_call(model.base_model):
        layer(x)
        layer(x)
        _costs_no_more(layer, of_lora, x)
    with torch.no_grad(), frozen_factors(model):
        layer(x)
        _costs_no_more(layer, of_lora, x)
