"""A server that knows only LoRA rolls out the policy of each step: a native adapter, or one inside of LoRA."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from wara_peft import WaRAConfig, reparametrize_lora, save_as_lora


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, initializer_range=0.3, pad_token_id=0, eos_token_id=None, **sizes)
    ).eval()


def policy(config: PeftConfig) -> PeftModel:
    model = get_peft_model(llama(), config)
    if isinstance(config, LoraConfig):
        reparametrize_lora(model)
    return model


NATIVE = WaRAConfig(target_modules="all-linear", r=2, wara_alpha=64)
INSIDE_LORA = LoraConfig(target_modules="all-linear", r=8, lora_alpha=64)
# what trains, and how its LoRA is written
WAYS = {
    "native": (NATIVE, lambda model, directory: save_as_lora(directory, model)),
    "inside LoRA": (INSIDE_LORA, lambda model, directory: model.save_pretrained(directory)),
}


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


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_knows_only_lora_rolls_out_the_policy_of_each_step(way, server, tmp_path):
    config, write = WAYS[way]
    model = policy(config).eval()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    prompt, rollouts = [3, 14, 15, 9], []
    for step in range(3):
        tokens = torch.tensor([[*prompt, *(rollouts[-1] if rollouts else [2, 6, 5])]])
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        directory = tmp_path / f"policy-{step}"
        write(model, directory)
        post(f"{server}/v1/load_lora_adapter", lora_name=directory.name, lora_path=str(directory))
        rollouts.append(post(f"{server}/v1/completions", model=directory.name, prompt=prompt)["tokens"])
        assert rollouts[-1] == generate(model, prompt)
    assert len({tuple(rollout) for rollout in rollouts}) == 3  # a stale policy would be seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_trl_syncs_adapters_of_lora_and_refuses_native_ones():
    """Its check of what vLLM can serve from an adapter's directory; without it TRL falls back to merged weights."""
    grpo = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    with pytest.raises(ValueError, match="supports LoRA adapters only, got `WaRAConfig`"):
        grpo.validate_lora_for_vllm_sync(policy(NATIVE))
    model = policy(INSIDE_LORA)
    assert grpo.validate_lora_for_vllm_sync(model) is model.peft_config["default"]
