"""A decoder reads its score before the padding, and which token pads is a setting of the base, not of the adapter."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from wara_peft import WaRAConfig

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
TOKENS = torch.tensor([[5, 6, 7, 8, 1]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(base: Path, directory: Path, pad_token: int | None, config_class: type = WaRAConfig) -> torch.Tensor:
    """Scores of a model that was saved after a trainer has set its padding token, as TRL's RewardTrainer does."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, config_class(task_type="SEQ_CLS", target_modules=["q_proj"])).eval()
    model.config.pad_token_id = pad_token
    model.save_pretrained(directory)
    with torch.no_grad():
        scores: torch.Tensor = model(TOKENS).logits
    return scores


def loaded(base: Path, directory: Path, **settings: int) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **settings)
    with torch.no_grad():
        scores: torch.Tensor = PeftModel.from_pretrained(model, directory).eval()(TOKENS).logits
    return scores


@pytest.mark.filterwarnings("ignore:This model reads its scores")
@pytest.mark.parametrize("config_class", [WaRAConfig, LoraConfig])
def test_why_a_reward_model_seems_to_be_another_one(config_class: type, base: Path, tmp_path: Path) -> None:
    """With the end of the text as padding the score is read one token earlier; the adapter itself is the same."""
    expected = saved(base, tmp_path / "adapter", 1, config_class)
    assert not torch.allclose(loaded(base, tmp_path / "adapter"), expected, atol=1e-3)
    assert torch.equal(loaded(base, tmp_path / "adapter", pad_token_id=1), expected)


def test_saving_a_model_whose_config_is_none_of_transformers(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 8), "score": torch.nn.Linear(8, 2)})
    model.config, model.name_or_path = {"model_type": "own"}, "base"  # type: ignore[assignment]
    config = WaRAConfig(task_type="SEQ_CLS", target_modules=["up"])
    get_peft_model(model, config).save_pretrained(tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_saving_says_so(base: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"not pad_token_id=1; .* with pad_token_id=None.*\(\.\.\., pad_token_id=1\)"):
        saved(base, tmp_path / "adapter", 1)


@pytest.mark.parametrize("how", ["the base has it too", "no score", "no base on disk"])
def test_silent_where_nothing_is_read_elsewhere(how: str, base: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if how == "the base has it too":
            saved(base, tmp_path / "adapter", None)
        else:
            model, task_type = LlamaForCausalLM.from_pretrained(base), None
            if how == "no base on disk":
                model, task_type = AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES)), "SEQ_CLS"
            model = get_peft_model(model, WaRAConfig(target_modules=["q_proj"], task_type=task_type))
            model.config.pad_token_id = 1
            model.save_pretrained(tmp_path / "adapter")
    assert not [warning for warning in said if "reads its scores" in str(warning.message)]
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
