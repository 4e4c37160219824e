"""One table of adapters: every form beside every kind of layer, and the options of configs, with what each can do.

Tests of the model, of export, of merging on disk, of reports and of batches run over the rows that can do it, and
`test_cases.py` shows that the others are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.models import (
    EXPERTS,
    TOKENS,
    WORDS,
    Attention,
    Everything,
    Matrix,
    OneLayer,
    bert,
    dictionary,
    gpt2,
    llama,
    low_rank,
    mixture,
    mlp,
    output,
    quantized,
    resnet,
    t5,
)
from tests.references import Mlp, tiny_vit
from wara_peft import WaRAConfig
from wara_peft.base_layers.quantization import keep_unpacked


@dataclass(frozen=True)
class Case:
    """A base model, an adapter's config, and what can be done with them.

    Attributes:
        name: its name.
        make: builds the base model.
        inputs: what the model is called with: a dict for models of transformers, a tensor for others.
        fields: fields of `WaRAConfig`.
        kinds: the kinds of layers that are adapted, as `module_shapes` names them.
        refused: the abilities of `test_cases.py` that it does not have, each with a part of the error's message.
        lora: how PEFT computes with the exported LoRA what WaRA computes: "unmerged", "merged", both or not at all.
        same_kernels: whether PyTorch takes the same kernels with and without an adapter, whose zeros then change no
            bit.
        merges_exactly: whether a merged weight is W + ΔW, which a quantized one is not.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Any
    fields: Mapping[str, Any]
    kinds: tuple[str, ...] = ("Linear",)
    refused: Mapping[str, str] = field(default_factory=dict)
    lora: tuple[str, ...] = ("unmerged", "merged")
    same_kernels: bool = True
    merges_exactly: bool = True

    @property
    def form(self) -> str:
        return str(self.fields.get("form", "subband"))

    @property
    def is_of_transformers(self) -> bool:
        return isinstance(self.inputs, dict)

    def can(self, *abilities: str) -> bool:
        """Whether the adapter can be added to the model, and do all of this."""
        return not {"add", *abilities} & self.refused.keys()

    def base(self) -> Any:
        """The base model, the same at every call."""
        torch.manual_seed(0)
        base = self.make().eval()
        keep_unpacked(base)  # bitsandbytes computes otherwise on weights that it has packed for the CPU
        return base

    def config(self, **more: Any) -> WaRAConfig:
        return WaRAConfig(**{**self.fields, **more})

    def adapted(self, init: bool = False) -> PeftModel:
        """A model with an adapter that changes something, unless `init` is True, the same at every call."""
        base = self.base()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "levels=. is more than is useful")
            torch.manual_seed(1)
            model = get_peft_model(base, self.config(init_weights=init))
        for name, parameter in model.named_parameters():
            if not init and parameter.requires_grad and "wara_" not in name:
                nn.init.normal_(parameter)
        return model.eval()

    def with_twin(self) -> PeftModel:
        """A model with the adapter, and with another that differs only in the values of its factors."""
        model = self.adapted()
        model.add_adapter("twin", self.config(init_weights=False, bias="none", trainable_token_indices=None))
        return model.eval()

    def output(self, model: nn.Module, **options: Any) -> Tensor:
        return output(model, self.inputs, **options)


def pictures(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def one(layer: Callable[..., nn.Module], *sizes: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: OneLayer(layer(*sizes, **options))


def tied_llama() -> nn.Module:
    model: nn.Module = llama(tie_word_embeddings=True)
    return model


BOTH, UNMERGED, MERGED = ("unmerged", "merged"), ("unmerged",), ("merged",)
FEATURES, SAMPLES = pictures(2, 16, 12), pictures(2, 12)
IMAGES = {"pixel_values": pictures(2, 1, 14, 14)}
SCENES = {"pixel_values": pictures(2, 3, 16, 16)}
SEQUENCES = {**WORDS, "decoder_input_ids": TOKENS}
LAYER, MLP, QUERIES, DOWN, EMBEDDING = (
    {"target_modules": names}
    for names in (["layer"], ["up", "down"], ["q_proj"], ["q_proj", "down_proj"], ["embed_tokens", "q_proj"])
)
OF_EXPERTS = {"target_modules": [], "target_parameters": EXPERTS}
MIXES_TOKENS = {
    **dict.fromkeys(
        ("merge", "export", "merge on disk"), r"form='grid', and in module '.+' it mixes tokens, which no weight"
    ),
    "combine": "it has form='grid', and mixes tokens",
}
FORMS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "subband": ({"wavelet": "db2"}, {}),
    "shared": ({}, {}),
    "tiny": ({}, {}),
    "grid": ({"grid_size": (4, 4), "num_prefix_tokens": 0}, MIXES_TOKENS),
}
"""Fields of each form, and what an adapter of this form cannot do."""

# kind: model, inputs, fields, and how its LoRA computes the same
LINEAR_KINDS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], tuple[str, ...]]] = {
    "Linear": (one(nn.Linear, 12, 10), FEATURES, LAYER, BOTH),
    "Conv1D": (one(Conv1D, 14, 9), pictures(2, 16, 9), LAYER, BOTH),
    "LowRankLinear": (one(low_rank), FEATURES, {**LAYER, "r": 1}, ()),
    "DictionaryLinear": (one(dictionary), FEATURES, {**LAYER, "r": 1}, ()),
}
OTHER_KINDS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "Embedding": (one(nn.Embedding, 40, 6), TOKENS),
    "Conv1d": (one(nn.Conv1d, 6, 10, 3), pictures(2, 6, 9)),
    "Conv2d": (one(nn.Conv2d, 5, 8, 3, padding=1), pictures(2, 5, 7, 7)),
    "Conv3d": (one(nn.Conv3d, 4, 6, 2), pictures(2, 4, 4, 4, 4)),
}
PARAMETERS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], tuple[str, ...]]] = {
    "Parameter": (
        one(Matrix, 10, 12),
        FEATURES,
        {"target_modules": [], "target_parameters": ["layer.matrix"]},
        BOTH,
    ),
    "MultiheadAttention": (Attention, FEATURES, {"target_modules": ["attention"]}, ()),
    "Experts": (mixture, WORDS, OF_EXPERTS, BOTH),
    "ExpertsInFirst": (partial(mixture, "gpt-oss"), WORDS, OF_EXPERTS, BOTH),
}


def every_form_and_kind() -> Iterator[Case]:
    for form, (of_form, refused) in FORMS.items():
        of_form = {**of_form, "form": form}
        for kind, (make, inputs, fields, lora) in LINEAR_KINDS.items():
            yield Case(f"{kind}, {form}", make, inputs, {**fields, **of_form}, (kind,), refused, lora)
        for kind, (make, inputs) in OTHER_KINDS.items():
            added = {} if form in ("subband", "shared") else {"add": rf"layer \({kind}\) is not supported.*{form}"}
            yield Case(f"{kind}, {form}", make, inputs, {**LAYER, **of_form}, (kind,), added)
        for kind, (make, inputs, fields, lora) in PARAMETERS.items():
            added = {} if form == "subband" else {"add": f"bare parameters, are not adapted by form='{form}'"}
            in_file = {"merge on disk": "0 tensors that MixtralForCausalLM loads"} if kind == "Experts" else {}
            yield Case(
                f"{kind}, {form}",
                make,
                inputs,
                {**fields, **of_form},
                (kind, "Linear") if kind == "MultiheadAttention" else (kind,),
                {
                    "mixed batch": "same for all samples of a batch",
                    "combine": "Adapters of bare parameters",
                    **in_file,
                    **added,
                },
                lora,
                same_kernels=kind != "MultiheadAttention",
            )


def options_of_configs() -> Iterator[Case]:
    """The options of a config, beside two linear layers and a head."""
    for name, fields in {
        "linear": MLP,
        "three levels": {**MLP, "wavelet": "db4", "levels": 3, "wara_alpha": 5},
        "two levels": {**MLP, "levels": 2, "use_rslora": True},
        "shared": {"target_modules": ["up"], "form": "shared", "wavelet": "sym4", "use_rslora": True},
        "unequal ranks": {**MLP, "rank_pattern": {"up": {"aa1": 9, "dd1": 0}}},
        "unequal alphas": {**MLP, "wara_alpha": 2, "alpha_pattern": {"up": 30}},
        "undecomposed": {"target_modules": r"up|down", "subband_ranks": {"aa0": 3}},
        "tiny": {**MLP, "form": "tiny", "wavelet": "db2", "wara_alpha": 60},
        "tiny, diagonal": {"target_modules": ["up"], "form": "tiny", "core": "diagonal", "r": 2},
    }.items():
        yield Case(name, mlp, SAMPLES, fields)
    yield Case("odd sizes", partial(Mlp, 7, 13), pictures(2, 7), {**MLP, "levels": 2})
    fields = {**LAYER, "wavelet": "db2", "levels": 2, "wara_alpha": 50}
    for name in ("nf4", "int8"):
        make = one(quantized, name)
        yield Case(name, make, pictures(2, 64), fields, lora=UNMERGED, merges_exactly=False)


def settings_of_convolutions() -> Iterator[Case]:
    for name, shape, make, lora in (
        ("pointwise", (2, 6, 5, 5), one(nn.Conv2d, 6, 4, 1, bias=False), BOTH),
        ("dilated", (2, 6, 9, 8), one(nn.Conv2d, 6, 9, (3, 2), stride=2, dilation=2, padding=(2, 1)), MERGED),
        ("circular", (2, 4, 6, 6), one(nn.Conv2d, 4, 6, 3, padding=2, padding_mode="circular"), MERGED),
        ("same", (2, 4, 6, 6), one(nn.Conv2d, 4, 6, 3, padding="same"), BOTH),
        ("grouped", (2, 8, 6, 6), one(nn.Conv2d, 8, 12, 3, groups=4), UNMERGED),
        ("depthwise", (2, 6, 6, 6), one(nn.Conv2d, 6, 6, 3, groups=6), UNMERGED),
        ("one channel", (2, 1, 6, 6), one(nn.Conv2d, 1, 1, 3), BOTH),
    ):
        yield Case(f"Conv2d, {name}", make, pictures(*shape), LAYER, ("Conv2d",), {}, lora)
    refused = {"mixed batch": "same as the number of inputs"}
    yield Case("Conv2d, unbatched", one(nn.Conv2d, 4, 6, 3), pictures(4, 6, 6), LAYER, ("Conv2d",), refused)
    everything = {"target_modules": ["embedding", "conv", "linear"]}
    kinds = ("Embedding", "Conv1d", "Linear")
    yield Case("everything", Everything, TOKENS, everything, kinds, same_kernels=False)


def whole_models() -> Iterator[Case]:
    for name, fields in {
        "all-linear": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        "three levels": {"target_modules": ["q_proj", "v_proj"], "wavelet": "db4", "levels": 3},
        "rslora": {**DOWN, "wavelet": "db2", "levels": 3, "wara_alpha": 60, "use_rslora": True},
        "shared": {"form": "shared", "alpha_pattern": {r".*layers\.1\..*": 30}},
        "undecomposed": {"target_modules": r".*mlp.*proj", "subband_ranks": {"aa0": 3}},
        "tiny": {"target_modules": "all-linear", "form": "tiny", "wavelet": "db2"},
    }.items():
        yield Case(f"llama, {name}", llama, WORDS, fields)
    fields = {"target_modules": ["c_attn", "c_fc", "c_proj"], "levels": 2, "task_type": "CAUSAL_LM"}
    yield Case("gpt2", gpt2, WORDS, fields, ("Conv1D",))
    yield Case("gpt2, shared", gpt2, WORDS, {"form": "shared", "wavelet": "coif1"}, ("Conv1D",))
    fields = {"target_modules": ["c_attn", "c_fc"], "form": "tiny", "core": "diagonal", "wavelet": "db2", "levels": 2}
    refused = dict.fromkeys(("read", "merge on disk"), r"without its basis \(save_basis=False\)")
    yield Case("gpt2, tiny, diagonal", gpt2, WORDS, {**fields, "save_basis": False}, ("Conv1D",), refused)
    in_full = {"combine": "train module 'classifier' in full"}
    fields = {"rank_pattern": {"query": 2, "key": {"dd1": 0}}, "alpha_pattern": {"value": 3}, "task_type": "SEQ_CLS"}
    yield Case("bert, patterns", bert, WORDS, {"target_modules": "all-linear", **fields}, refused=in_full)
    yield Case("vit", tiny_vit, IMAGES, {"target_modules": ["q_proj", "o_proj"]})
    fields = {"target_modules": ["q_proj", "fc1"], "form": "tiny", "subband_ranks": {"aa0": 2, "dd1": 1}}
    yield Case("vit, tiny", tiny_vit, IMAGES, fields)
    ranks = {"subband_ranks": {"aa1": 6}, "rank_pattern": {"fc1": {"dd1": 0}}}
    fields = {"target_modules": ["q_proj", "fc1"], "form": "grid", "wavelet": "db2", **ranks}
    yield Case("vit, grid", tiny_vit, IMAGES, fields, refused=MIXES_TOKENS)
    fields = {"target_modules": ["v_proj", "fc2"], "form": "grid", "grid_pairs": "shared", "levels": 2}
    yield Case("vit, grid, shared", tiny_vit, IMAGES, fields, refused=MIXES_TOKENS)
    yield Case("resnet", resnet, SCENES, {"target_modules": r".*convolution"}, ("Conv2d",))


def weights_besides_layers() -> Iterator[Case]:
    """Embeddings, weights that several layers have, and what trains in full."""
    yield Case("with biases", mlp, SAMPLES, {**MLP, "bias": "wara_only"})
    in_full = {"combine": "train module '.*' in full"}
    yield Case("with a head", mlp, SAMPLES, {"target_modules": ["up"], "modules_to_save": ["head"]}, refused=in_full)
    fields = {"target_modules": ["query", "dense"], "bias": "all", "modules_to_save": ["classifier"]}
    yield Case("bert, biases", bert, WORDS, fields, refused=in_full)
    fields = {**QUERIES, "modules_to_save": ["embed_tokens", "norm"]}
    refused = {**in_full, "mixed batch": "Mixed batching is only supported for"}
    yield Case("llama, layers in full", llama, WORDS, fields, refused=refused)
    yield Case("llama, tokens", llama, WORDS, {**QUERIES, "trainable_token_indices": [3, 7]})
    fields = {**QUERIES, "trainable_token_indices": {"embed_tokens": [3, 7]}}
    yield Case("llama, tied tokens", tied_llama, WORDS, fields)
    kinds = ("Embedding", "Linear")
    yield Case("llama, embedding", llama, WORDS, EMBEDDING, kinds)
    fields = {**EMBEDDING, "ensure_weight_tying": True}
    yield Case("llama, tied embedding", tied_llama, WORDS, fields, kinds, lora=UNMERGED)
    refused = dict.fromkeys(("merge", "merge on disk"), "its weight is tied to 'lm_head")
    yield Case("llama, half of a tie", tied_llama, WORDS, EMBEDDING, kinds, refused, UNMERGED)
    fields = {"target_modules": ["embed_tokens", "q"], "ensure_weight_tying": True, "task_type": "SEQ_2_SEQ_LM"}
    yield Case("t5, tied embeddings", t5, SEQUENCES, fields, kinds, lora=MERGED)


SMALL = (every_form_and_kind, options_of_configs, settings_of_convolutions, weights_besides_layers)
"""The parts for tests of what a single layer does."""
LARGE = (every_form_and_kind, settings_of_convolutions, weights_besides_layers, whole_models)
"""The parts for tests of what a model does, whatever the options of its layers."""
PARTS = (*SMALL, whole_models)
CASES = {case.name: case for part in PARTS for case in part()}


def each_case(
    *abilities: str,
    parts: Sequence[Callable[[], Iterator[Case]]] = PARTS,
    where: Callable[[Case], bool] = lambda case: True,
) -> pytest.MarkDecorator:
    """Run a test for the rows of these parts of the table that have these abilities."""
    cases = [CASES[case.name] for part in parts for case in part() if case.can(*abilities) and where(case)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
