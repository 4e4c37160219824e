"""What the code on each page takes as given: models, data and directories, all of them tiny and made on the spot."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from tests.training_run import base_model as classifier
from tests.training_run import data
from wara_peft import WaRAConfig

Names = dict[str, Any]
TOKENS = torch.arange(1, 19).view(3, 6)


def llama(width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))


def adapted(model: torch.nn.Module, **fields: Any) -> PeftModel:
    """With an adapter that changes something."""
    return get_peft_model(model, WaRAConfig(target_modules=["q_proj", "v_proj"], init_weights=False, **fields))


def language_batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": TOKENS, "labels": TOKENS}] * 2


def labelled_batches() -> list[dict[str, Tensor]]:
    rows = data()
    keys = rows[0].keys()
    return [{key: torch.stack([row[key] for row in rows[i : i + 8]]) for key in keys} for i in range(0, 48, 8)]


def arguments(**options: Any) -> TrainingArguments:
    return TrainingArguments("output", use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, **options)


def save_base(name: str, width: int = 32) -> None:
    """A language model with a tokenizer of ten words."""
    llama(width).save_pretrained(name)
    save_tokenizer(name)


def save_tokenizer(name: str) -> None:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate("_abcdefghi")}, "_"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="_", unk_token="_").save_pretrained(name)


def save_adapter(base: str, name: str) -> None:
    save_base(base)
    adapted(AutoModelForCausalLM.from_pretrained(base), task_type="CAUSAL_LM").save_pretrained(name)


def readme() -> Names:
    if not Path("my-model").exists():
        save_base("my-model", 64)
    return {}


def coming_from_lora() -> Names:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(llama(), config).save_pretrained("my-lora")
    return {"model": llama()}


def inside_lora() -> Names:
    return {"base": llama()}


def targets_and_forms() -> Names:
    return {"model": llama(), "dataloader": language_batches()}


def saving_and_loading() -> Names:
    if not Path("my-adapter").exists():
        save_adapter("my-base-model", "my-adapter")
    return {"other_model": llama(48), "arguments": arguments(), "dataset": data()}


def merging() -> Names:
    if not Path("my-adapter").exists():
        save_adapter("my-base-model", "my-adapter")
    return {"model": adapted(llama())}


class Engine:
    """Takes a LoRA, as a server does."""

    def load(self, directory: str) -> None:
        assert PeftModel.from_pretrained(llama(), directory).peft_config["default"].r == 16


def export() -> Names:
    if not Path("my-adapter").exists():
        from tests.diffusion_models import TINY
        from tests.layers.test_parameters import EXPERTS, qwen3_moe

        save_adapter("my-base-model", "my-adapter")
        lora = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained("my-base-model"), lora).save_pretrained("my-other-lora")
        tiny = TINY["unet and text encoder"]
        tiny.pipeline(**tiny.models()).save_pretrained("my-pipeline")
        for name, component in (("my-unet-adapter", "unet"), ("my-text-adapter", "text_encoder")):
            config = WaRAConfig(r=2, target_modules=tiny.targets[component], init_weights=False)
            get_peft_model(tiny.models()[component], config).save_pretrained(name)
        qwen3_moe().save_pretrained("my-moe-model")
        config = WaRAConfig(target_modules=[], target_parameters=EXPERTS, init_weights=False, task_type="CAUSAL_LM")
        get_peft_model(qwen3_moe(), config).save_pretrained("my-moe-adapter")
    return {"model": adapted(llama()), "steps": 2, "train_one_step": lambda model: None, "engine": Engine()}


def serving() -> Names:
    model = adapted(llama()).eval()
    config = WaRAConfig(r=1, levels=2, target_modules=["k_proj"], init_weights=False)
    model.add_adapter("other", config)
    return {"model": model, "batches": [{"input_ids": TOKENS}], "inputs": {"input_ids": TOKENS}}


def vision() -> Names:
    if not Path("my-vit").exists():
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        ViTForImageClassification(ViTConfig(image_size=12, patch_size=4, **sizes)).save_pretrained("my-vit")
    return {}


def tiny() -> Names:
    return {"model": llama()}


def ranks() -> Names:
    return {
        "model": classifier(),
        "dataloader": labelled_batches(),
        "arguments": arguments(per_device_train_batch_size=8),
        "dataset": data(),
    }


def quantized() -> Names:
    save_base("my-model", 64)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained("my-model", quantization_config=config)
    model.save_pretrained("my-4-bit-model")
    adapted(model, task_type="CAUSAL_LM").save_pretrained("my-adapter")
    return {}


def compression() -> Names:
    if not Path("my-base-model").exists():
        save_base("my-base-model")
        Path("texts.txt").write_text("a b c d\ne f g h i\n")
        classifier().save_pretrained("my-classifier")
        save_tokenizer("my-classifier")
        for file in ("train.csv", "test.csv"):
            Path(file).write_text("text,label\na b c,0\nd e f g,1\nh i,0\n")
    return {
        "model": classifier().eval(),
        "dataloader": labelled_batches(),
        "language_model": llama().eval(),
        "prompt": {"input_ids": TOKENS},
        "network": nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)),
        "dense_network": nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)),
    }


def training_low_rank() -> Names:
    dataset = [{"input_ids": row, "labels": row} for row in TOKENS]
    return {"model": llama(), "arguments": arguments(), "dataset": dataset}


NAMES: dict[str, Callable[[], Names]] = {
    "README.md": readme,
    "docs/coming_from_lora.md": coming_from_lora,
    "docs/inside_lora.md": inside_lora,
    "docs/targets_and_forms.md": targets_and_forms,
    "docs/saving_and_loading.md": saving_and_loading,
    "docs/merging.md": merging,
    "docs/export.md": export,
    "docs/serving.md": serving,
    "docs/vision.md": vision,
    "docs/tiny.md": tiny,
    "docs/ranks.md": ranks,
    "docs/quantized.md": quantized,
    "docs/compression.md": compression,
    "docs/training_low_rank.md": training_low_rank,
}
"""Pages with code, and what makes that which their blocks find: called before each block, in an empty directory."""


def check_readme(names: Names, printed: str) -> None:
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert len(losses) == 5 and losses[0] > 1 and losses[-1] < 0.3
    assert losses == sorted(losses, reverse=True)

    # The trained model has learnt the text. A fresh copy of the frozen weights computes the same with the adapter, and
    # with the exported LoRA, which PEFT loads.
    trained = names["base"].cpu().double().eval()
    frozen = {
        key.replace("base_layer.", ""): value for key, value in trained.state_dict().items() if "wara_" not in key
    }
    tokens = torch.arange(32).view(1, -1)
    with torch.no_grad():
        expected = trained(input_ids=tokens).logits
        assert (expected[:, :-1].argmax(-1) == tokens[:, 1:]).double().mean() > 0.9
        for saved in ("my-adapter", "my-lora"):
            fresh = LlamaForCausalLM(trained.config)
            fresh.load_state_dict(frozen)
            assert not torch.allclose(fresh.double()(input_ids=tokens).logits, expected, atol=1)
            loaded = PeftModel.from_pretrained(fresh, saved).double().eval()
            torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-4)
    assert loaded.peft_config["default"].peft_type == "LORA" and loaded.peft_config["default"].r == 16

    lora = get_peft_model(LlamaForCausalLM(trained.config), LoraConfig(r=8, target_modules="all-linear"))
    assert f"trainable params: {lora.get_nb_trainable_parameters()[0]:,} " in printed
    assert "\n8 64.0\n" in printed


def check_coming_from_lora(names: Names, printed: str) -> None:
    assert names["config"].total_rank == 32
    ranks = names["model"].peft_config["default"].ranks_of("model.layers.0.self_attn.q_proj")
    assert ranks == {"aa1": 4, "ad1": 4, "da1": 4, "dd1": 4, "aa0": 4}
    assert [group["lr"] for group in names["optimizer"].param_groups[:2]] == [2e-4, 2e-4 * 16]


def check_inside_lora(names: Names, printed: str) -> None:
    trained = sum(p.numel() for p in names["model"].parameters() if p.requires_grad)
    assert f" parameters in place of {trained:,} (50%)." in printed


def check_targets_and_forms(names: Names, printed: str) -> None:
    assert "{'aa1': 8, 'ad1': 4, 'da1': 4, 'dd1': 0, 'aa0': 0}" in printed


def check_export(names: Names, printed: str) -> None:
    assert names["config"].r == 16
    assert names["image"].size == (8, 8)
    assert names["pipeline"].get_list_adapters() == {"unet": ["wara"], "text_encoder": ["wara"]}


CHECKS: dict[str, Callable[[Names, str], None]] = {
    "README.md": check_readme,
    "docs/coming_from_lora.md": check_coming_from_lora,
    "docs/inside_lora.md": check_inside_lora,
    "docs/targets_and_forms.md": check_targets_and_forms,
    "docs/export.md": check_export,
}
"""What must have come of a page's code where the page says so."""
