"""A LoRA of a live WaRA model: the same tensors with new values, in PEFT's hotswap and in a server that rolls out."""

from __future__ import annotations

import copy
import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale as peft_rescale
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from tests.references import Conv1DModel, Mlp
from tests.test_many_adapters import Everything
from wara_peft import WaRAConfig, lora_view, rescale_adapter_scale, to_lora
from wara_peft.forms import SubbandFactor

IN_FULL = "ignore:PEFT loads all of this LoRA:UserWarning"
USEFUL = "ignore:levels=. is more than is useful:UserWarning"
pytestmark = [pytest.mark.filterwarnings(IN_FULL), pytest.mark.filterwarnings(USEFUL)]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, groups=2)
        self.linear = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


UNDECOMPOSED = {"aa0": 3, "aa1": 0, "ad1": 0, "da1": 0, "dd1": 0}
# model, config: one row a case
CASES = {
    "linear": (Mlp, {"target_modules": ["up", "down"]}),
    "three levels": (lambda: Mlp(16, 24), {"target_modules": ["up"], "wavelet": "db4", "levels": 3, "wara_alpha": 5}),
    "odd sizes": (lambda: Mlp(width=7, hidden=13), {"target_modules": ["up", "down"], "levels": 2, "wavelet": "db2"}),
    "unequal ranks": (Mlp, {"target_modules": ["up", "down"], "rank_pattern": {"up": {"aa1": 9, "aa0": 2, "dd1": 0}}}),
    "undecomposed": (Mlp, {"target_modules": ["up"], "subband_ranks": UNDECOMPOSED}),
    "shared": (Mlp, {"target_modules": ["up"], "form": "shared", "wavelet": "sym4", "use_rslora": True}),
    "tiny": (Mlp, {"target_modules": ["up", "down"], "form": "tiny", "wara_alpha": 60, "r": 2}),
    "conv1d": (Conv1DModel, {"target_modules": ["proj"], "wavelet": "db2"}),
    "embedding, convolution": (Everything, {"target_modules": ["embedding", "conv", "linear"]}),
    "groups": (Grouped, {"target_modules": ["conv", "linear"]}),
    "in full": (Mlp, {"target_modules": ["up", "down"], "modules_to_save": ["head"], "bias": "wara_only"}),
}


def adapted(case: str) -> PeftModel:
    make, fields = CASES[case]
    return get_peft_model(make(), WaRAConfig(init_weights=False, **fields))


@torch.no_grad()
def train(model: nn.Module) -> None:
    """As far from the values of before as any number of optimizer steps may come."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("case", CASES)
def test_refresh_writes_what_to_lora_makes_into_the_same_tensors(case):
    model = adapted(case)
    view = lora_view(model)
    held = view.state_dict()
    places = {key: value.data_ptr() for key, value in held.items()}
    first = {key: value.clone() for key, value in held.items()}
    for scale in (1.0, 0.25):
        train(model)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", scale)
        assert all(torch.equal(value, first[key]) for key, value in held.items())  # until it is refreshed
        view.refresh()
        config, expected = to_lora(model)
        assert held.keys() == expected.keys() == view.state_dict().keys()
        for key, value in expected.items():
            torch.testing.assert_close(held[key], value, atol=1e-6, rtol=1e-6)
            assert held[key].data_ptr() == places[key] == view.state_dict()[key].data_ptr()
            assert not held[key].requires_grad and held[key].grad_fn is None
        first = {key: value.clone() for key, value in held.items()}
    assert view.config.to_dict() == config.to_dict()
    assert isinstance(view.config, LoraConfig)


class Allocations(TorchDispatchMode):
    """Counts the storages that operations make, beside those that were there."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.made.append(str(func))
        return result


@pytest.mark.parametrize("case", ["linear", "three levels", "undecomposed", "unequal ranks"])
def test_refresh_allocates_nothing_after_the_first_time(case):
    model = adapted(case)
    view = lora_view(model)
    view.refresh()  # makes the taps of the filters, once in a process
    expected = {key: value.clone() for key, value in view.state_dict().items()}
    train(model)
    axes = [module.axis for module in model.modules() if isinstance(module, SubbandFactor)]
    taps = [tensor for axis in axes for shared in axis.constants._held.values() for tensor in shared.tensors]
    with Allocations([*model.parameters(), *view.state_dict().values(), *taps]) as allocations:
        view.refresh()
    assert allocations.made == []
    assert all(not torch.equal(value, expected[key]) for key, value in view.state_dict().items())

    with Allocations([*model.parameters(), *view.state_dict().values()]) as allocations:
        to_lora(model)
    assert allocations.made  # the count can count


@pytest.mark.parametrize("form", ["subband", "tiny"])
def test_shorter_dtypes(form):
    model = get_peft_model(
        Mlp().bfloat16(),
        WaRAConfig(target_modules=["up"], form=form, r=2, init_weights=False),
        autocast_adapter_dtype=False,
    )
    view = lora_view(model)
    train(model)
    view.refresh()
    for key, value in to_lora(model)[1].items():
        assert value.dtype == view.state_dict()[key].dtype == torch.bfloat16
        assert torch.equal(view.state_dict()[key], value)


def test_hotswap_makes_a_lora_model_the_wara_model():
    base = Mlp().double()
    model = get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["up", "down"], wara_alpha=40))
    view = lora_view(model)
    lora = get_peft_model(copy.deepcopy(base), view.config)
    x = torch.randn(5, 12, dtype=torch.float64)
    for _ in range(2):
        train(model)
        view.refresh()
        named = _insert_adapter_name_into_state_dict(view.state_dict(), "default", "lora_")
        hotswap_adapter_from_state_dict(lora, named, "default", view.config)
        torch.testing.assert_close(lora(x), model(x), atol=1e-10, rtol=1e-10)
        assert (lora(x) - base(x)).abs().max() > 0.1


def test_a_named_adapter_of_several_and_of_transformers():
    model = llama()
    model.add_adapter(WaRAConfig(target_modules=["q_proj"], init_weights=False), "first")
    model.add_adapter(WaRAConfig(target_modules=["v_proj", "q_proj"], init_weights=False), "second")
    view = lora_view(model, "second")
    train(model)
    view.refresh()
    expected = to_lora(model, adapter_name="second")[1]
    assert view.state_dict().keys() == expected.keys() and len(expected) == 8
    torch.testing.assert_close(view.state_dict(), expected)


def test_what_it_refuses():
    model = adapted("linear")
    with pytest.raises(TypeError, match="must be a model with WaRA adapters; to_lora reads directories"):
        lora_view("some/path")
    with pytest.raises(ValueError, match="no adapter 'nobody', only 'default'"):
        lora_view(model, "nobody")
    model.add_adapter("other", WaRAConfig(target_modules=["up"], init_weights=False))
    view = lora_view(model, "other")
    before = {key: value.clone() for key, value in view.state_dict().items()}
    model.delete_adapter("other")
    with pytest.raises(RuntimeError, match="'other' is not there any more in module 'up'"):
        view.refresh()
    model.add_adapter("other", WaRAConfig(target_modules=["up"], r=1, init_weights=False))
    with pytest.raises(
        RuntimeError, match=r"not with its rank of 16. Make a new view with lora_view\(model, 'other'\)"
    ):
        view.refresh()
    assert all(torch.equal(view.state_dict()[key], value) for key, value in before.items())


# A server that rolls out


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, initializer_range=0.3, pad_token_id=0, eos_token_id=None, **sizes)
    ).eval()


def generate(model: nn.Module, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    result = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False)
    return result[0, len(prompt) :].tolist()


class RolloutServer(BaseHTTPRequestHandler):
    """What vLLM answers to the requests of such a loop, with PEFT's LoRA behind it and no knowledge of WaRA."""

    model: PeftModel | None = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.load(body) if self.path == "/v1/load_lora_adapter" else self.complete(body)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def load(self, body: dict) -> dict:
        assert json.loads(Path(body["lora_path"], "adapter_config.json").read_text())["peft_type"] == "LORA"
        type(self).model = PeftModel.from_pretrained(llama(), body["lora_path"], adapter_name=body["lora_name"])
        return {}

    def complete(self, body: dict) -> dict:
        model = type(self).model
        assert model is not None and model.active_adapter == body["model"]
        return {"tokens": generate(model.eval(), body["prompt"])}

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), RolloutServer) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def post(address: str, **body: object) -> dict:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=1800) as answer:
        return json.loads(answer.read())


def test_a_server_that_knows_lora_alone_rolls_out_the_policy_of_each_step(server, tmp_path):
    model = get_peft_model(llama(), WaRAConfig(target_modules="all-linear", r=2, wara_alpha=64, init_weights=False))
    view = lora_view(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    prompt, rollouts = [3, 14, 15, 9], []
    for step in range(3):
        tokens = torch.tensor([[*prompt, *(rollouts[-1] if rollouts else [2, 6, 5])]])
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        view.refresh()
        view.save_pretrained(tmp_path / f"policy-{step}")
        post(f"{server}/v1/load_lora_adapter", lora_name=f"policy-{step}", lora_path=str(tmp_path / f"policy-{step}"))
        rollouts.append(post(f"{server}/v1/completions", model=f"policy-{step}", prompt=prompt)["tokens"])
        assert rollouts[-1] == generate(model, prompt)
    assert len({tuple(rollout) for rollout in rollouts}) == 3  # a stale policy would be seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_trl_takes_the_views_config_where_it_refuses_wara():
    """By its check of what vLLM can serve from an adapter's directory, which falls back to merged weights."""
    grpo = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    model = get_peft_model(llama(), WaRAConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="supports LoRA adapters only, got `WaRAConfig`"):
        grpo.validate_lora_for_vllm_sync(model)
    view = lora_view(model)
    in_its_place = SimpleNamespace(active_adapters=["default"], peft_config={"default": view.config})
    assert grpo.validate_lora_for_vllm_sync(in_its_place) is view.config
    assert grpo.round_lora_rank(view.config.r) == 16


# Rescaling


def test_rescaling_is_that_of_peft_on_the_exported_lora():
    base = Mlp()
    model = get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["up", "down"], init_weights=False))
    lora = get_peft_model(copy.deepcopy(base), to_lora(model)[0])
    named = _insert_adapter_name_into_state_dict(to_lora(model)[1], "default", "lora_")
    assert not lora.load_state_dict(named, strict=False).unexpected_keys
    x = torch.randn(5, 12)
    before = model(x)
    with rescale_adapter_scale(model, 0.3), peft_rescale(lora, 0.3):
        torch.testing.assert_close(model(x), lora(x), atol=1e-5, rtol=1e-5)
        assert (model(x) - before).abs().max() > 0.1
    assert torch.equal(model(x), before)
    with pytest.raises(ZeroDivisionError), rescale_adapter_scale(model, 0.3):
        raise ZeroDivisionError
    assert torch.equal(model(x), before)
    with (
        pytest.raises(TypeError, match="multiplier must be a number, and is 'half'"),
        rescale_adapter_scale(model, "half"),
    ):
        pass
    with pytest.raises(ValueError, match="no WaRA adapters"), rescale_adapter_scale(base, 0.3):
        pass
    with pytest.raises(ValueError, match="LoraLayer"), peft_rescale(model, 0.3):  # what PEFT's own says of WaRA
        pass
