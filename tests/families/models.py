"""The table of model families: each builds a tiny model from its config, and has inputs for it.

A family that cannot do what all others do says so in its row: `refused` has the error by what was asked,
`left_out` the layers that "all-linear" does not adapt, `still` those that its inputs do not reach.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests import diffusion_models

TOKENS = torch.arange(1, 13).view(2, 6)
MASK = torch.ones_like(TOKENS)
BASE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = {**BASE, "intermediate_size": 24, "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 32}
ENCODER = {**BASE, "intermediate_size": 24, "vocab_size": 40, "max_position_embeddings": 32, "num_labels": 3}
IMAGES = {**BASE, "intermediate_size": 24, "image_size": 8, "patch_size": 2, "num_channels": 1}
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
SPEECH = {
    **BASE,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 2),
    "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "num_feat_extract_layers": 2,
}
MOE = {**DECODER, "num_experts_per_tok": 2}
STATES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


@dataclass(frozen=True, repr=False)
class Family:
    """A row of the table.

    Attributes:
        build: makes the model, in any dtype.
        inputs: arguments of its forward, floating ones in float32.
        left_out: endings of the names that "all-linear" leaves out, each of which the warning has to have.
        still: a regular expression of adapted modules that a training step does not move; the row says why.
        refused: for what is asked in a test, the pattern of the error that says why the family cannot do it.
        grid: the pattern of the error that form="grid" with "all-linear" raises, or None if it trains.
        needs: the package that the model is from, where not everyone has it.
    """

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Any]
    left_out: tuple[str, ...] = ()
    still: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    grid: str | None = "part of a language model"
    needs: str = ""


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


TEXT = {"input_ids": TOKENS, "attention_mask": MASK}
PAIRS = {"input_ids": TOKENS, "attention_mask": MASK, "decoder_input_ids": TOKENS[:, :4]}
PIXELS = {"pixel_values": noise(2, 1, 8, 8)}
RGB = {"pixel_values": noise(2, 3, 32, 32)}
SOUND = {"input_values": noise(2, 80)}


def model(make: Any, name: str, **fields: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a model from the config of that name, by an auto class or by the model's own."""

    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**fields)
        config._experts_implementation = "eager"  # the others know no float64 on CPUs
        return make.from_config(config) if hasattr(make, "from_config") else make(config)

    return build


def sentence_embedder() -> nn.Module:
    """A sentence-transformers model: tokens, their mean, a dense layer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    with tempfile.TemporaryDirectory() as folder:
        model(AutoModel, "Bert", **ENCODER)().save_pretrained(folder)
        transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
        modules = [Transformer(folder), Pooling(16), Dense(16, 8)]
    return SentenceTransformer(modules=modules, device="cpu")


def timm_vit() -> nn.Module:
    """A ViT of timm."""
    import timm

    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def causal(name: str, **options: Any) -> Family:
    row = {key: options.pop(key) for key in Family.__dataclass_fields__.keys() & options.keys()}
    return Family(model(AutoModelForCausalLM, name, **options), **{"inputs": {**TEXT, "use_cache": False}, **row})


def of_auto(auto: Any, inputs: Mapping[str, Any], **fields: Any) -> Callable[..., Family]:
    def make(name: str, **options: Any) -> Family:
        row = {key: options.pop(key) for key in Family.__dataclass_fields__.keys() & options.keys()}
        return Family(model(auto, name, **options), **{"inputs": inputs, **fields, **row})

    return make


classifier = of_auto(AutoModelForSequenceClassification, TEXT)
seq2seq = of_auto(AutoModelForSeq2SeqLM, {**PAIRS, "use_cache": False})
vision = of_auto(transformers.AutoModelForImageClassification, PIXELS, grid=None)
speech = of_auto(transformers.AutoModelForCTC, SOUND)
headless = of_auto(AutoModel, TEXT)
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

FAMILIES: dict[str, Family] = {
    # decoders
    "llama": causal("Llama", **DECODER),
    "mistral": causal("Mistral", **DECODER),
    "qwen2": causal("Qwen2", **DECODER),
    "qwen3": causal("Qwen3", **DECODER, head_dim=8),
    "gemma": causal("Gemma", **DECODER, head_dim=8),
    "gemma2": causal("Gemma2", **DECODER, head_dim=8),
    "gemma3": causal("Gemma3Text", **DECODER, head_dim=8),
    "phi": causal("Phi", **DECODER),
    "phi3": causal("Phi3", **DECODER, **IDS),
    "gpt2": causal("GPT2", n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16),
    "gpt_neo": causal(
        "GPTNeo",
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        vocab_size=40,
        attention_types=[[["global"], 1]],
        max_position_embeddings=32,
    ),
    "gptj": causal("GPTJ", n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16, rotary_dim=4),
    "gpt_neox": causal("GPTNeoX", **{**DECODER, "num_key_value_heads": None}),
    "gpt_bigcode": causal("GPTBigCode", n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16),
    "codegen": causal("CodeGen", n_embd=16, n_layer=1, n_head=4, vocab_size=40, n_positions=16, rotary_dim=4),
    "falcon": causal("Falcon", **{**BASE, "vocab_size": 40}),
    "opt": causal(
        "OPT", **{**BASE, "vocab_size": 40, "ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 16}
    ),
    "bloom": causal("Bloom", hidden_size=16, n_layer=1, n_head=2, vocab_size=40),
    "mpt": causal("Mpt", d_model=16, n_layers=1, n_heads=2, vocab_size=40, max_seq_len=32),
    "stablelm": causal("StableLm", **DECODER),
    "starcoder2": causal("Starcoder2", **DECODER),
    "olmo2": causal("Olmo2", **DECODER),
    "cohere": causal("Cohere", **DECODER),
    "granite": causal("Granite", **DECODER),
    "smollm3": causal("SmolLM3", **DECODER, **IDS),
    "glm4": causal("Glm4", **DECODER, head_dim=8, **IDS),
    # encoders
    "bert": classifier("Bert", **ENCODER),
    "roberta": classifier("Roberta", **ENCODER),
    "xlm_roberta": classifier("XLMRoberta", **ENCODER),
    "deberta": classifier("Deberta", **ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": classifier("DebertaV2", **ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "modernbert": classifier("ModernBert", **ENCODER, **IDS, cls_token_id=1, sep_token_id=2),
    "distilbert": classifier("DistilBert", dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=40, num_labels=3),
    "electra": classifier("Electra", **ENCODER, embedding_size=8),
    "albert": classifier("Albert", **{**ENCODER, "num_hidden_layers": 2}, embedding_size=8),
    "mpnet": classifier("MPNet", **ENCODER),
    "nystromformer": classifier(
        "Nystromformer", **{**ENCODER, "max_position_embeddings": 32}, segment_means_seq_len=6, num_landmarks=6
    ),
    # encoder-decoders
    "t5": seq2seq("T5", d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40),
    "mt5": seq2seq("MT5", d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40),
    "bart": seq2seq("Bart", **SEQ2SEQ),
    "pegasus": seq2seq("Pegasus", **SEQ2SEQ),
    "marian": seq2seq("Marian", **SEQ2SEQ, pad_token_id=0, decoder_start_token_id=0),
    "m2m_100": seq2seq("M2M100", **SEQ2SEQ, encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    "blenderbot": seq2seq("Blenderbot", **SEQ2SEQ),
    "whisper": Family(
        model(
            transformers.AutoModelForSpeechSeq2Seq,
            "Whisper",
            **{key: value for key, value in SEQ2SEQ.items() if key != "max_position_embeddings"},
            num_mel_bins=4,
            max_source_positions=6,
            max_target_positions=8,
            **IDS,
            decoder_start_token_id=1,
        ),
        {"input_features": noise(2, 4, 12), "decoder_input_ids": TOKENS[:, :4], "use_cache": False},
    ),
    # vision
    "vit": vision("ViT", **IMAGES, num_labels=3),
    "deit": Family(
        model(transformers.DeiTForImageClassification, "DeiT", **IMAGES, num_labels=3),
        PIXELS,
        grid=None,
    ),
    "beit": vision("Beit", **IMAGES, num_labels=3),
    "dinov2": vision("Dinov2", **IMAGES, num_labels=3),
    "swin": vision(
        "Swin",
        image_size=8,
        patch_size=2,
        num_channels=1,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=2,
        num_labels=3,
        grid="its layers see windows of patches",
    ),
    "swinv2": vision(
        "Swinv2",
        image_size=8,
        patch_size=2,
        num_channels=1,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=2,
        num_labels=3,
        grid="its layers see windows of patches",
    ),
    "convnext": vision(
        "ConvNext",
        num_channels=1,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        image_size=8,
        num_labels=3,
        grid="feature maps of four dimensions",
    ),
    "convnextv2": vision(
        "ConvNextV2",
        num_channels=1,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        image_size=8,
        num_labels=3,
        grid="feature maps of four dimensions",
    ),
    "mobilevit": vision(
        "MobileViT",
        image_size=32,
        output_stride=8,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 4, 4, 4, 4, 4, 8],
        num_attention_heads=2,
        expand_ratio=1.0,
        mlp_ratio=1.0,
        num_labels=3,
        inputs=RGB,
        grid="every second patch of a row",
    ),
    "poolformer": vision(
        "PoolFormer",
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        num_labels=3,
        inputs=RGB,
        grid="one vector for a whole image",
    ),
    "pvt": vision(
        "Pvt",
        image_size=64,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        num_labels=3,
        inputs={"pixel_values": noise(2, 3, 64, 64)},
    ),
    "levit": Family(
        model(
            transformers.LevitForImageClassification,
            "Levit",
            image_size=96,
            hidden_sizes=[8, 8, 8],
            depths=[1, 1, 1],
            num_attention_heads=[1, 1, 1],
            key_dim=[4, 4, 4],
            num_labels=3,
            patch_size=16,
        ),
        {"pixel_values": noise(2, 3, 96, 96)},
        grid="halves its grids",
    ),
    "segformer": Family(
        model(
            transformers.AutoModelForSemanticSegmentation,
            "Segformer",
            num_channels=1,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 8, 8],
            num_attention_heads=[1, 1, 1, 1],
            mlp_ratios=[2, 2, 2, 2],
            decoder_hidden_size=8,
            num_labels=3,
        ),
        {"pixel_values": noise(2, 1, 64, 64)},
        grid=None,
    ),
    "dpt": Family(
        model(
            transformers.AutoModelForSemanticSegmentation,
            "DPT",
            **{**IMAGES, "num_hidden_layers": 4, "patch_size": 4, "image_size": 16},
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[4, 4, 4, 4],
            fusion_hidden_size=4,
            is_hybrid=False,
            num_labels=3,
        ),
        {"pixel_values": noise(2, 1, 16, 16)},
        grid=None,
    ),
    "vit_mae": Family(
        model(
            transformers.AutoModelForPreTraining,
            "ViTMAE",
            **IMAGES,
            decoder_hidden_size=8,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=16,
        ),
        {**PIXELS, "noise": noise(2, 16).abs()},
        grid="shuffles its patches",
    ),
    "yolos": Family(
        model(
            transformers.AutoModelForObjectDetection,
            "Yolos",
            **{**IMAGES, "image_size": [8, 8]},
            num_detection_tokens=3,
            num_labels=3,
        ),
        PIXELS,
        grid="detection tokens come after",
    ),
    "hiera": vision(
        "Hiera",
        image_size=[32, 32],
        num_channels=3,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 1],
        num_query_pool=1,
        num_labels=3,
        inputs=RGB,
        grid="orders its patches by the windows",
    ),
    # audio
    "wav2vec2": speech("Wav2Vec2", **SPEECH),
    "hubert": speech("Hubert", **SPEECH),
    # its attention hands the weights to a function
    "wavlm": speech(
        "WavLM", **SPEECH, num_buckets=8, max_bucket_distance=16, left_out=("k_proj", "out_proj", "q_proj", "v_proj")
    ),
    "ast": Family(
        model(
            transformers.AutoModelForAudioClassification,
            "AST",
            **{**BASE, "num_hidden_layers": 2, "intermediate_size": 24},
            num_mel_bins=8,
            max_length=16,
            patch_size=4,
            frequency_stride=4,
            time_stride=4,
            num_labels=3,
        ),
        {"input_values": noise(2, 16, 8)},
        grid=None,
    ),
    # images and text
    "clip": Family(
        model(AutoModel, "CLIP", text_config={**ENCODER, "eos_token_id": 12}, vision_config=IMAGES, projection_dim=8),
        {**TEXT, **PIXELS},
        grid=None,
    ),
    "siglip": Family(
        model(AutoModel, "Siglip", text_config={**ENCODER}, vision_config=IMAGES),
        {**TEXT, **PIXELS},
        left_out=("attention.out_proj",),
        grid=None,
    ),
    "blip": Family(
        model(
            transformers.AutoModelForImageTextToText,
            "Blip",
            text_config={**ENCODER, "encoder_hidden_size": 16, "projection_dim": 8},
            vision_config={**IMAGES, "num_channels": 3},
            projection_dim=8,
            image_text_hidden_size=8,
        ),
        {**TEXT, "pixel_values": noise(2, 3, 8, 8)},
        # it does not tell PEFT of its output layer, whose weight is the embedding's
        refused={"merge": "weight is tied to 'text_decoder.bert.embeddings.word_embeddings'"},
        grid=None,
    ),
    "vilt": Family(
        model(
            transformers.ViltForQuestionAnswering,
            "Vilt",
            **{**ENCODER, "image_size": 8, "patch_size": 2, "num_channels": 1},
        ),
        {**TEXT, **PIXELS},
        grid="text comes before the patches",
    ),
    "llava": Family(
        model(
            transformers.AutoModelForImageTextToText,
            "Llava",
            text_config={"model_type": "llama", **DECODER},
            vision_config={"model_type": "clip_vision_model", **IMAGES, "projection_dim": 8},
            image_token_index=39,
            vision_feature_layer=-1,
        ),
        {"input_ids": torch.cat((torch.full((2, 16), 39), TOKENS), 1), **PIXELS, "use_cache": False},
        grid=None,
    ),
    # mixtures of experts
    "mixtral": causal("Mixtral", **MOE, num_local_experts=4),
    "qwen2_moe": causal(
        "Qwen2Moe", **MOE, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4
    ),
    "qwen3_moe": causal("Qwen3Moe", **MOE, head_dim=8, moe_intermediate_size=16, num_experts=4),
    "olmoe": causal("Olmoe", **MOE, num_experts=4),
    "gpt_oss": causal(
        "GptOss", **MOE, head_dim=8, num_local_experts=4, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}
    ),
    "deepseek_v3": causal(
        "DeepseekV3",
        **{**MOE, "num_hidden_layers": 2, "num_key_value_heads": 2},
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
        # PEFT's LoRA takes their names for those of the experts
        left_out=("down_proj", "gate_proj", "up_proj"),
    ),
    # state space models
    "mamba": causal("Mamba", **STATES, time_step_rank=4, left_out=("dt_proj", "out_proj")),
    "falcon_mamba": causal("FalconMamba", **STATES, time_step_rank=4, left_out=("dt_proj", "out_proj")),
    "mamba2": causal("Mamba2", **STATES, num_heads=4, head_dim=8, n_groups=1, chunk_size=4, left_out=("out_proj",)),
    "jamba": causal(
        "Jamba",
        **{**DECODER, "num_hidden_layers": 2},
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        num_experts=4,
        use_mamba_kernels=False,
        left_out=("dt_proj",),
    ),
    "recurrent_gemma": causal(
        "RecurrentGemma", **{**DECODER, "num_hidden_layers": 3}, lru_width=16, attention_window_size=8
    ),
    "rwkv": causal(
        "Rwkv", vocab_size=40, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=24
    ),
    # others of transformers
    "patchtst": Family(
        model(
            transformers.PatchTSTForPrediction,
            "PatchTST",
            context_length=8,
            patch_length=2,
            patch_stride=2,
            prediction_length=4,
            num_input_channels=2,
            d_model=8,
            num_attention_heads=2,
            num_hidden_layers=1,
            ffn_dim=12,
            share_projection=True,
            scaling=False,
            distribution_output="normal",
            loss="mse",
        ),
        {"past_values": noise(2, 8, 2)},
        grid="of 4 dimensions",
    ),
    "sentence-transformers": Family(
        sentence_embedder,
        {"input": TEXT},
        needs="sentence_transformers",
        still=r"0\.model\.pooler\.dense",  # another pooling is used
    ),
    "timm": Family(
        timm_vit,
        {"x": noise(2, 3, 8, 8)},
        needs="timm",
        grid=None,
    ),
    # diffusers
    "unet": Family(
        diffusion_models.unet,
        {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 5]), "encoder_hidden_states": noise(2, 5, 16)},
        grid=None,
    ),
    "dit": Family(
        diffusion_models.dit,
        {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": torch.tensor([3, 5]),
            "class_labels": torch.tensor([0, 2]),
        },
        grid=None,
    ),
    "sd3": Family(
        diffusion_models.sd3_transformer,
        {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 16),
            "pooled_projections": noise(2, 16),
            "timestep": torch.tensor([3.0, 5.0]),
        },
        # the last block does not go on with the text
        still=r"transformer_blocks\.1\.attn\.add_q_proj",
        grid=None,
    ),
    "flux": Family(
        diffusion_models.flux_transformer,
        {
            "hidden_states": noise(2, 16, 4),
            "encoder_hidden_states": noise(2, 5, 16),
            "pooled_projections": noise(2, 16),
            "timestep": torch.tensor([0.3, 0.5]),
            "img_ids": torch.cat((torch.zeros(16, 1), torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))), 1),
            "txt_ids": torch.zeros(5, 3),
        },
        grid=None,
    ),
}
