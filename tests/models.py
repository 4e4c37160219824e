"""The small models that most tests share, each the same at every call, and how they are called."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.references import Mlp
from wara_peft.factorized import DictionaryLinear, LowRankLinear
from wara_peft.factorized.sparse_rows import pack_bits

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = torch.arange(3, 15).view(2, 6)
WORDS = {"input_ids": TOKENS}
X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval()


def llama(model_class: type[PreTrainedModel] = LlamaForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    return model_class(LlamaConfig(**{**SIZES, **TEXT, "num_key_value_heads": 1, **fields})).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)).eval()


def bert(model_class: type[PreTrainedModel] = BertForSequenceClassification, **fields: Any) -> Any:
    torch.manual_seed(0)
    return model_class(BertConfig(**{**SIZES, "vocab_size": 40, "num_labels": 3, **fields})).eval()


def t5(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**{**sizes, **TEXT, **fields})).eval()


def mamba() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(vocab_size=40, **sizes)).eval()


def resnet() -> Any:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return ResNetModel(config).eval()


MIXTURE = {**SIZES, "vocab_size": 40, "intermediate_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2}
MIXTURES: dict[str, PretrainedConfig] = {
    "Mixtral": MixtralConfig(**MIXTURE, num_experts_per_tok=2, num_local_experts=4),
    "Qwen3-MoE": Qwen3MoeConfig(**MIXTURE, num_experts_per_tok=2, num_experts=4, moe_intermediate_size=16, head_dim=8),
    "gpt-oss": GptOssConfig(
        **MIXTURE, num_experts_per_tok=2, num_local_experts=4, head_dim=8, rope_parameters={"rope_theta": 1e4}
    ),
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(name: str = "Mixtral") -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(MIXTURES[name])
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


class OneLayer(nn.Module):
    """A layer of any kind."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


class Attention(nn.Module):
    """PyTorch's attention, of the input to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


class Matrix(nn.Module):
    """Multiplies by a parameter that belongs to no layer."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class Everything(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.linear = nn.Linear(12, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.conv(self.embedding(input_ids).mT).mT))


def low_rank() -> LowRankLinear:
    return LowRankLinear(12, 16, 4)


def dictionary() -> DictionaryLinear:
    layer = DictionaryLinear(12, 16, 5, 3)
    layer.support.copy_(pack_bits(torch.rand(16, 5).argsort(1) < 3))
    nn.init.normal_(layer.values)
    return layer


def quantized(quant_type: str) -> nn.Module:
    import bitsandbytes as bnb

    linear = nn.Linear(64, 64)
    layer: nn.Module
    if quant_type == "int8":
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type=quant_type)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def run(model: nn.Module, inputs: Any = X, **options: Any) -> Tensor:
    """The output, logits or last hidden state, for a tensor or a dict of them."""
    result = model(**inputs, **options) if isinstance(inputs, dict) else model(inputs, **options)
    return getattr(result, "logits", result[0] if isinstance(result, dict) else result)


@torch.no_grad()
def output(model: nn.Module, inputs: Any = X, **options: Any) -> Tensor:
    return run(model.eval(), inputs, **options).float()
