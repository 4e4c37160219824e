"""Models and adapters that the benchmarks compare. Weights are random: no step's time depends on their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ptwt
import torch
from peft import (
    FourierFTConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    RandLoraConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from wara_peft import WaRAConfig

ENCODER_TARGETS = ["query", "key", "value", "dense"]
DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Shape:
    """A model to adapt, the modules that are adapted, and the shape (batch, tokens) of its input."""

    build: Callable[[], nn.Module]
    targets: list[str]
    batch: int
    tokens: int


def encoder(smoke: bool = False) -> Shape:
    """MiniLM's encoder: 384 wide, 6 layers, every linear layer adapted, 32 × 48 tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    if not smoke:
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(vocab_size=1000, **sizes)
    return Shape(lambda: BertModel(config, add_pooling_layer=False), ENCODER_TARGETS, *((2, 4) if smoke else (32, 48)))


def decoder(smoke: bool = False, head: bool = False, width: int = 768) -> Shape:
    """A Llama-shaped decoder, with a language model's head or without, every projection adapted: 768 wide, 4 layers,
    4 × 128 tokens. One of another width has one layer, and half as many tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    batch, tokens = (2, 4) if smoke else (4, 128) if width == 768 else (2, 128)
    if not smoke:
        sizes = {"hidden_size": width, "num_hidden_layers": 4 if width == 768 else 1}
        sizes |= {"num_attention_heads": width // 64, "intermediate_size": -(-width * 8 // 768) * 256}
    config = LlamaConfig(vocab_size=1000, num_key_value_heads=sizes["num_attention_heads"], **sizes)
    model_class = LlamaForCausalLM if head else LlamaModel
    return Shape(lambda: model_class(config), DECODER_TARGETS, batch, tokens)


WARA = {
    "WaRA haar L1": {"r": 4},
    "WaRA db4 L1": {"r": 4, "wavelet": "db4"},
    "WaRA haar L3": {"r": 4, "levels": 3},
    "WaRA db4 L3": {"r": 4, "levels": 3, "wavelet": "db4"},
}


def configs(targets: list[str], smoke: bool = False) -> dict[str, PeftConfig]:
    """Methods by name, WaRA and what PEFT ships. Where it is not said, settings are PEFT's defaults."""
    small = {"r": 4} if smoke else {}
    frequencies = {"n_frequency": 8} if smoke else {}
    found: dict[str, PeftConfig] = {f"LoRA r={r}": LoraConfig(r=r, lora_alpha=r) for r in (8, 16, 40)}
    found |= {name: WaRAConfig(**fields) for name, fields in WARA.items()}
    found |= {
        "DoRA r=8": LoraConfig(r=8, lora_alpha=8, use_dora=True),
        "MiSS r=16": MissConfig(r=16),
        "LoKr r=8": LoKrConfig(r=8),
        "VeRA": VeraConfig(**small),
        "RandLoRA": RandLoraConfig(**small),
        "WaveFT": WaveFTConfig(**frequencies),
        "FourierFT": FourierFTConfig(**frequencies),
    }
    for config in found.values():
        config.target_modules = set(targets)
    return found


class NaiveWaRA(nn.Module):
    """WaRA with one Haar level by its formula: in every forward ptwt's dense inverse 2-D transform of all B_s A_s."""

    def __init__(self, base: nn.Linear, r: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        half_out, half_in = base.out_features // 2, base.in_features // 2
        self.factor_a = nn.Parameter(torch.randn(4, r, half_in) / half_in)
        self.factor_b = nn.Parameter(torch.zeros(4, half_out, r))

    def forward(self, x: Tensor) -> Tensor:
        approximation, *details = (self.factor_b @ self.factor_a)[:, None]  # (1, m/2, n/2) each
        delta = ptwt.waverec2((approximation, tuple(details)), "haar").squeeze(0)
        result: Tensor = self.base(x) + x @ delta.T
        return result


def adapted(shape: Shape, config: PeftConfig | None) -> nn.Module:
    """A model with that adapter, or with the naive WaRA for None, in training mode."""
    torch.manual_seed(0)
    model = shape.build()
    if config is not None:
        return get_peft_model(model, config)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in shape.targets:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, NaiveWaRA(module))
    return model


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """One whole step: forward, backward, and AdamW on what is trained."""
    return optimized(model, lambda: model(input_ids=tokens).last_hidden_state.square().mean())


def language_model_step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """The same with the loss of a language model, whose head takes part."""
    return optimized(model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss)


def optimized(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def trained_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
