"""What each engine takes of a LoRA, in one table, and the checks of an adapter against it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ..base_layers.kinds import ModuleShape
from ..disk.adapters.contents import PEFT_PREFIX
from ..disk.adapters.source import AdapterSource
from ..messages import first_few

FileFormat = Literal["peft", "diffusers", "gguf"]
EngineName = Literal["peft", "vllm", "vllm-3d", "sglang", "llama.cpp", "diffusers"]


@dataclass(frozen=True)
class Engine:
    """What an engine takes.

    Attributes:
        read_from: the release in which that was looked up.
        format: the format of its files.
        experts: whether it reads a LoRA of a mixture's experts "stacked", as PEFT writes it, "apart", one for each
            expert and projection, or not at all (None).
        takes_all: whether it takes adapters of other layers than linear ones, and weights that are trained or saved
            in full: embeddings, convolutions, biases, `modules_to_save`.
        ranks: the values that its limit of the rank may have; empty if that is any number.
    """

    read_from: str
    format: FileFormat = "peft"
    experts: Literal["stacked", "apart"] | None = None
    takes_all: bool = False
    ranks: tuple[int, ...] = ()


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for `--max-lora-rank`."""
_VLLM = "vLLM 0.26: LoRAConfig; vllm/lora/lora_model.py of commit 0306474, peft_helper.py of e745baf"
ENGINES: dict[str, Engine] = {
    "peft": Engine("PEFT 0.21", experts="stacked", takes_all=True),
    "vllm": Engine(_VLLM, experts="apart", ranks=VLLM_RANKS),
    # For models whose class sets is_3d_moe_weight, such as gpt-oss and Qwen3.5-MoE, or with
    # --enable-mixed-moe-lora-format and "is_3d_lora_weight": true.
    "vllm-3d": Engine(_VLLM, experts="stacked", ranks=VLLM_RANKS),
    # It renames w1, w2, w3 by itself, and drops PEFT's stacks without a word.
    "sglang": Engine("SGLang of mid-2026: srt/lora/lora.py, its pull requests 25528 and 27381", experts="apart"),
    # What the two formats hold is checked where they are written.
    "llama.cpp": Engine("llama.cpp as in xllamacpp 2026.10: tests/lora/test_gguf.py runs it", format="gguf"),
    "diffusers": Engine("diffusers 0.42: load_lora_weights", format="diffusers", takes_all=True),
}
"""The engines by name; "peft" takes whatever an export writes."""


def format_for(engine: str | None, format: str | None) -> FileFormat:
    """Return the format of the files that an engine reads, or the one that is asked for.

    Raises:
        ValueError: there is no such engine or format, or the engine reads another format.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine={engine!r} must be one of {', '.join(map(repr, ENGINES))}.")
    if format is not None and format not in get_args(FileFormat):
        raise ValueError(f"format={format!r} must be one of {', '.join(map(repr, get_args(FileFormat)))}.")
    wanted = "peft" if engine is None else ENGINES[engine].format
    if engine is not None and format not in (None, wanted):
        raise ValueError(f"format={format!r} does not fit engine={engine!r}, which reads {wanted!r}.")
    return cast(FileFormat, format or wanted)


def vllm_max_lora_rank(rank: int) -> int | None:
    """Give the smallest `--max-lora-rank` with which vLLM serves a LoRA of this rank; None if there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def check_rank(name: EngineName, rank: int | float | None) -> None:
    """Raise an error if an engine takes no LoRA of this rank; a share of the energy, or None, tells no rank yet.

    Raises:
        ValueError: the rank is above the engine's largest.
    """
    largest = max(ENGINES[name].ranks, default=None)
    if largest is not None and isinstance(rank, int) and rank > largest:
        raise ValueError(
            f"{name} serves no LoRA of rank {rank}, and {largest} at most: give rank={largest} (--rank {largest}), "
            "or merge the adapter."
        )


def check_engine(source: AdapterSource, name: EngineName) -> None:
    """Raise an error if an engine does not take an adapter's LoRA.

    Raises:
        ValueError: the adapter holds something that the engine does not accept.
    """
    engine = ENGINES[name]
    _check_factorized(source, strict=name != "peft")
    refused = [] if engine.takes_all else _refused(source, engine.experts is not None)
    if refused:
        raise ValueError(
            f"{name} takes adapters of linear layers{' and of experts' if engine.experts else ''}, and not "
            f"{' or '.join(refused)}. Merge the adapter instead, train it without them, or export it for 'peft'."
        )
    if name == "vllm-3d":
        _check_pairs_of_stacks(source)


def tell_what_engines_refuse(source: AdapterSource, strict: bool) -> None:
    """Warn of parts of the adapter that some engine which serves LoRA does not accept; raise an error if `strict`."""
    _check_factorized(source, strict)
    refused = _refused(source, experts=False)
    if refused:
        text = (
            f"PEFT loads all of this LoRA, but engines that serve LoRA take adapters of linear layers alone, not "
            f"{' and '.join(refused)}."
        )
        if strict:
            raise ValueError(f"{text} Merge the adapter instead, or export it without `strict`.")
        warnings.warn(text)


def _refused(source: AdapterSource, experts: bool) -> list[str]:
    """Name what is neither a linear layer nor, if an engine reads these, a stack of experts."""
    kinds: dict[str, list[str]] = {}
    for name, kind in ((name, shape.kind) for name, shape in source.modules.items()):
        if not kind.is_linear and not (experts and kind.has_experts):
            kinds.setdefault(f"{kind.name}{'' if kind.is_parameter else ' layers'}", []).append(repr(name))
    refused = [f"adapters of {layers} ({first_few(names)})" for layers, names in kinds.items()]
    others = [repr(key.removeprefix(PEFT_PREFIX)) for key in source.others]
    if others:
        refused.append(f"weights trained or saved in full ({first_few(others)})")
    return refused


def _check_factorized(source: AdapterSource, strict: bool) -> None:
    factorized = [repr(name) for name, shape in source.modules.items() if shape.kind.is_factorized]
    if factorized:
        text = (
            f"Neither PEFT nor engines take a LoRA beside factorised layers, such as {first_few(factorized)}. This "
            "one is exact where these layers are dense, as `nn.Linear` with the weight that they stand for."
        )
        if strict:
            raise ValueError(f"{text} Merge the adapter instead, which stays factorised.")
        warnings.warn(text)


def _check_pairs_of_stacks(source: AdapterSource) -> None:
    """vLLM takes the outer of two LoRAs around experts for down_proj's, and the inner one for gate_up_proj's."""
    stacks: dict[str, list[ModuleShape]] = {}
    for name, shape in source.modules.items():
        if shape.kind.has_experts:
            stacks.setdefault(name.rpartition(".")[0], []).append(shape)
    single = [repr(owner) for owner, shapes in stacks.items() if len(shapes) != 2]
    if single:
        raise ValueError(
            f"vLLM reads stacked experts in pairs, gate_up_proj and down_proj, and only one is adapted in "
            f"{first_few(single)}. Train both, or merge the adapter."
        )
