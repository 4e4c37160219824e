"""Tiny pipelines of diffusers, made from configs, each with what it takes to sample from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 16
"""Of text encoders, and so of what the other components take from them."""


ATTENTION = r"to_[qkv]|to_out\.0|net\.0\.proj|net\.2"
"""A regular expression of the linear layers of a transformer's block, without those of a second stream."""
SIZE = {"height": 64, "width": 64}
"""Of images of pipelines without an autoencoder, which take it to be one that divides by eight."""


def unet() -> UNet2DConditionModel:
    """Two resolutions; attention, resnets with and without shortcuts, a downsampler and an upsampler."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def dit() -> DiTTransformer2DModel:
    """Two blocks over patches, with classes."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    ).eval()


def sd3_transformer() -> SD3Transformer2DModel:
    """Two blocks in which image and text tokens meet."""
    torch.manual_seed(1)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def flux_transformer() -> FluxTransformer2DModel:
    """A block with two streams, and one with a single stream."""
    torch.manual_seed(2)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def text_encoder() -> CLIPTextModel:
    """Two layers over a vocabulary of eight."""
    torch.manual_seed(3)
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=8,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval()


def tokenizer() -> CLIPTokenizer:
    """Letters, each of them also as a word."""
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "c", "a</w>", "b</w>", "c</w>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=12)


def autoencoder() -> AutoencoderKL:
    """Of no compression."""
    torch.manual_seed(4)
    return AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)


def stable_diffusion(unet: nn.Module, text_encoder: nn.Module) -> StableDiffusionPipeline:
    """The pipeline with a UNet and a text encoder."""
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        autoencoder(), text_encoder, tokenizer(), unet, scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_3(transformer: nn.Module) -> StableDiffusion3Pipeline:
    """Without text encoders: prompts come embedded."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(transformer, scheduler, None, None, None, None, None, None, None)


def flux(transformer: nn.Module, text_encoder: nn.Module | None = None) -> FluxPipeline:
    """Without a second text encoder: prompts come embedded."""
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, text_encoder, None, None, None, transformer)


def _embedded(seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, 5, WIDTH, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, WIDTH, generator=generator),
    }


@dataclass(frozen=True)
class Tiny:
    """A pipeline to test with.

    Attributes:
        components: what makes each model that adapters are for, by the component's name.
        pipeline: makes the pipeline of them.
        targets: of an adapter on each component.
        prompt: arguments of a call.
    """

    components: dict[str, Callable[[], nn.Module]]
    pipeline: Callable[..., DiffusionPipeline]
    targets: dict[str, Any]
    prompt: Callable[[], dict[str, Any]]

    def sample(self, pipeline: DiffusionPipeline, **options: Any) -> Tensor:
        """Latents after two steps from the same noise."""
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "latent", **self.prompt(), **options}
        with torch.no_grad():
            return pipeline(generator=torch.manual_seed(0), **options).images

    def models(self) -> dict[str, nn.Module]:
        """The components, as they are without adapters."""
        return {name: make() for name, make in self.components.items()}


TINY = {
    "unet and text encoder": Tiny(
        {"unet": unet, "text_encoder": text_encoder},
        stable_diffusion,
        {
            "unet": rf".*({ATTENTION}|time_emb_proj|conv_in|conv1|conv2|conv_shortcut|\.conv)",
            "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        },
        lambda: {"prompt": "a c", "height": 8, "width": 8},
    ),
    "SD3": Tiny(
        {"transformer": sd3_transformer},
        stable_diffusion_3,
        {"transformer": rf".*({ATTENTION}|add_[qkv]_proj|to_add_out|linear|pos_embed\.proj|proj_out)"},
        lambda: {
            **_embedded(),
            **SIZE,
            "negative_prompt_embeds": _embedded(6)["prompt_embeds"],
            "negative_pooled_prompt_embeds": _embedded(6)["pooled_prompt_embeds"],
        },
    ),
    "Flux": Tiny(
        {"transformer": flux_transformer},
        flux,
        {
            "transformer": rf".*({ATTENTION}|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|x_embedder|linear)",
        },
        lambda: {**_embedded(), **SIZE},
    ),
}
