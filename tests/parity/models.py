"""Small models for the table, and what is asked of an adapter everywhere: that it starts from nothing and trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
)

from tests.references import Mlp

from .table import Method

TOKENS = torch.arange(1, 13).view(2, 6)
WORDS = {"input_ids": TOKENS}
X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
ATTENTION = ["q_proj", "v_proj"]


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval()


def llama(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    ).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes)).eval()


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=4)
    ).eval()


def run(model: nn.Module, inputs: Any = X, **options: Any) -> Tensor:
    """The output, or logits, for a tensor or a dict of them."""
    result = model(**inputs, **options) if isinstance(inputs, dict) else model(inputs, **options)
    return getattr(result, "logits", result)


@torch.no_grad()
def output(model: nn.Module, inputs: Any = X, **options: Any) -> Tensor:
    return run(model.eval(), inputs, **options).float()


def adapted(method: Method, base: nn.Module | None = None, init: Any = False, **fields: Any) -> PeftModel:
    """A model with an adapter that changes something, unless init says otherwise, the same at every call."""
    base = mlp() if base is None else base
    fields.setdefault("target_modules", ["up", "down"] if isinstance(base, Mlp) else ATTENTION)
    torch.manual_seed(1)
    return get_peft_model(base, method.config(init, **fields)).eval()


def layers_of(model: nn.Module, method: Method) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, method.layer_class)}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(one, other, atol=tolerance, rtol=tolerance)


def train(model: nn.Module, inputs: Any = X, steps: int = 5) -> None:
    """Train towards random outputs: the loss falls."""
    trained = [value for value in model.parameters() if value.requires_grad]
    goal = torch.randn(output(model, inputs).shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(steps):
        loss = (run(model.train(), inputs).float() - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]


def check_adapts(method: Method, base: nn.Module, inputs: Any, targets: Any, tolerance: float = 1e-4) -> PeftModel:
    """A new adapter changes nothing, and by training the output but not the base; merged it computes the same."""
    before = output(base, inputs)
    model = adapted(method, copy.deepcopy(base), init=True, target_modules=targets)
    assert layers_of(model, method)
    assert close(output(model, inputs), before, tolerance)
    train(model, inputs)
    after = output(model, inputs)
    assert not close(after, before, 1e-3)
    with model.disable_adapter():
        assert close(output(model, inputs), before, tolerance)
    assert close(output(copy.deepcopy(model).merge_and_unload(), inputs), after, tolerance)
    return model
