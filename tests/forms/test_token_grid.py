"""Grids and prefix tokens read off models of transformers, each by a forward; and models that are refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    HieraConfig,
    Llama4VisionConfig,
    Llama4VisionModel,
    LlamaConfig,
    LwDetrViTConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    VideoMAEConfig,
    ViTConfig,
    ViTMAEConfig,
    YolosConfig,
)

from tests.references import tiny_vit
from wara_peft import WaRAConfig
from wara_peft.layers.base import WaRALayer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {"patch_size": 2, "num_channels": 1, **SIZES}
TARGETS = r"(?!head).*(query|q_proj|fc1|pwconv1)"  # the head of SigLIP pools all tokens to one

# config, height and width of an image, expected prefix tokens, rows and columns
MODELS = {
    "vit": (ViTConfig(image_size=8, intermediate_size=24, **PATCHES), (8, 8), (1, 4, 4)),
    "vit, not square": (ViTConfig(image_size=(4, 12), intermediate_size=24, **PATCHES), (4, 12), (1, 2, 6)),
    "deit": (DeiTConfig(image_size=8, intermediate_size=24, **PATCHES), (8, 8), (2, 4, 4)),
    "dinov2": (Dinov2Config(image_size=16, **PATCHES), (12, 12), (1, 6, 6)),
    "dinov2 with registers": (
        Dinov2WithRegistersConfig(image_size=16, num_register_tokens=3, **PATCHES),
        (12, 12),
        (4, 6, 6),
    ),
    "siglip": (SiglipVisionConfig(image_size=8, intermediate_size=24, **PATCHES), (8, 8), (0, 4, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_grids(name):
    config, (height, width), expected = MODELS[name]
    torch.manual_seed(0)
    base = AutoModel.from_config(config).eval()
    x = torch.randn(2, 1, height, width)
    before = base(pixel_values=x).last_hidden_state
    model = get_peft_model(base, WaRAConfig(form="grid", target_modules=TARGETS, init_weights=False, wara_alpha=64))
    seen = []
    for layer in model.modules():
        if isinstance(layer, WaRALayer):
            layer.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0].shape[1])))
    assert not torch.allclose(model(pixel_values=x).last_hidden_state, before, atol=1e-3)
    assert seen
    for layer, tokens in seen:
        assert layer.token_mixing["default"].grid.split(tokens) == expected


def clip() -> nn.Module:
    text = {"vocab_size": 40, "intermediate_size": 24, "max_position_embeddings": 16, **SIZES}
    vision = {"image_size": 8, "intermediate_size": 24, **PATCHES}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision))


def test_both_towers_of_clip():
    model = get_peft_model(clip(), WaRAConfig(form="grid", target_modules=r"vision_model.*q_proj"))
    grids = [m.token_mixing["default"].grid for m in model.modules() if isinstance(m, WaRALayer)]
    assert [(grid.size, grid.prefix) for grid in grids] == [((4, 4), 1)]
    with pytest.raises(ValueError, match=r"'text_model.*q_proj'.*language model \(clip_text_model\)"):
        get_peft_model(clip(), WaRAConfig(form="grid", target_modules=["q_proj"]))


class Causal(nn.Module):
    """Not of transformers: its attention says what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
        self.attention.is_causal = True


REFUSED = {
    "llama": (
        lambda: AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=24, vocab_size=40, **SIZES)),
        r"'model.layers.0.self_attn.q_proj', which is part of a language model \(Llama.*leak the future",
    ),
    "llama without a head": (
        lambda: AutoModel.from_config(LlamaConfig(intermediate_size=24, vocab_size=40, **SIZES)),
        r"part of a language model \(Llama.*leak the future",
    ),
    "bert": (
        lambda: AutoModel.from_config(BertConfig(intermediate_size=24, vocab_size=40, **SIZES)),
        r"part of a language model \(bert\)",
    ),
    "a causal module": (Causal, r"part of a language model \(ModuleDict\)"),
    "swin": (
        lambda: AutoModel.from_config(
            SwinConfig(image_size=16, embed_dim=8, depths=[1], num_heads=[2], window_size=2, patch_size=2)
        ),
        "of a swin model: its layers see windows of patches",
    ),
    "hiera": (
        lambda: AutoModel.from_config(
            HieraConfig(image_size=[32, 32], embed_dim=4, depths=[1, 1], num_heads=[1, 1], num_query_pool=1)
        ),
        "of a hiera model: it orders its patches by the windows",
    ),
    "lw_detr": (
        lambda: AutoBackbone.from_config(
            LwDetrViTConfig(image_size=8, mlp_ratio=1, window_block_indices=[0], num_windows=4, **PATCHES)
        ),
        "of a lw_detr_vit model: its layers see windows of patches",
    ),
    "llama4": (
        lambda: Llama4VisionModel(
            Llama4VisionConfig(image_size=8, intermediate_size=24, projector_input_dim=8, **PATCHES)
        ),
        "of a llama4_vision_model model: its class token comes after the patches",
    ),
    "convnext": (
        lambda: AutoModel.from_config(ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1)),
        "of a convnext model: its linear layers see feature maps of four dimensions",
    ),
    "yolos": (
        lambda: AutoModel.from_config(
            YolosConfig(num_detection_tokens=2, intermediate_size=24, **{**PATCHES, "image_size": [8, 8]})
        ),
        "of a yolos model: its detection tokens come after the patches",
    ),
    "vit_mae": (
        lambda: AutoModel.from_config(ViTMAEConfig(image_size=8, intermediate_size=24, **PATCHES)),
        "of a vit_mae model: it shuffles its patches",
    ),
}


@pytest.mark.parametrize("explicit", [{}, {"grid_size": (2, 2), "num_prefix_tokens": 0}])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_stay_as_they_are(name, explicit):
    make, message = REFUSED[name]
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, WaRAConfig(form="grid", target_modules=TARGETS, **explicit))
    assert {name: type(module) for name, module in model.named_modules()} == before


# config, input, tokens that are as many as a square's, what is expected of them
NO_GRID = {
    "frames of a video": (
        VideoMAEConfig(image_size=8, num_frames=4, tubelet_size=1, intermediate_size=24, **PATCHES),
        lambda: {"pixel_values": torch.randn(1, 4, 1, 8, 8)},
        r"64 tokens in module '.*query' fit no grid: expected a grid of",
    ),
    "padded images": (
        Siglip2VisionConfig(num_patches=16, intermediate_size=24, **PATCHES),
        lambda: {
            "pixel_values": torch.randn(1, 16, 4),
            "pixel_attention_mask": torch.ones(1, 16),
            "spatial_shapes": torch.tensor([[2, 8]]),
        },
        r"16 tokens in module 'encoder.layers.0.self_attn.q_proj' fit no grid: expected a grid of",
    ),
}


@pytest.mark.parametrize("name", NO_GRID)
def test_what_is_no_grid_is_not_taken_for_a_square(name):
    config, inputs, message = NO_GRID[name]
    model = get_peft_model(AutoModel.from_config(config), WaRAConfig(form="grid", target_modules=r".*(query|q_proj)"))
    with pytest.raises(ValueError, match=message):
        model(**inputs())


@pytest.mark.parametrize("form", ["grid", "tiny"])
def test_other_layers_are_refused(form):
    model = tiny_vit()
    with pytest.raises(TypeError, match=rf"projection \(Conv2d\) is not supported.*linear layers.*form='{form}'"):
        get_peft_model(model, WaRAConfig(form=form, target_modules=["q_proj", "projection"]))
    assert not any(isinstance(module, WaRALayer) for module in model.modules())


def test_levels_beyond_the_grid_warn():
    with pytest.warns(UserWarning, match=r"levels=3.*\(row axis of length 7: at most 2\)"):
        get_peft_model(tiny_vit(), WaRAConfig(form="grid", levels=3, target_modules=["q_proj"]))
