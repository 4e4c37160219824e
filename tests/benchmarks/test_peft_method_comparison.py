"""The experiments for PEFT's method comparison do what that harness asks of a config and of a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.forked_python import run_python
from wara_peft import WaRAConfig

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peft_method_comparison"
EXPERIMENTS = FOLDER / "experiments"
TRAINED = {"wara/llama-3.2-3B-R32": 4_587_520, "wara/llama-3.2-3B-R64": 9_175_040}
"""Over 28 layers 16 (or 32) numbers for each row and column of q (3072, 3072) and v (1024, 3072)."""


def llama(**sizes: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes))


def llama_3_2_3b() -> LlamaForCausalLM:
    """The model's shapes, without memory for its weights."""
    with torch.device("meta"):
        return llama(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
        )


def of(experiment: str) -> PeftConfig:
    return PeftConfig.from_pretrained(str(EXPERIMENTS / experiment))


def test_the_harness_finds_these_experiments_and_no_others() -> None:
    found = {str(path.parent.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.rglob("adapter_config.json")}
    assert found == set(TRAINED) and all(len(name.split("/")) == 2 for name in found)


@pytest.mark.parametrize("experiment", TRAINED)
def test_configs_are_whole_and_what_their_names_say(experiment: str, tmp_path: Path) -> None:
    config = of(experiment)
    assert isinstance(config, WaRAConfig) and config.levels == 1 and config.form == "subband"
    assert 4 * config.r == int(experiment.rpartition("R")[2]) and config.wara_alpha == 2 * 4 * config.r
    # Every field is in the file, so that other defaults of a later version would not change the experiment.
    config.save_pretrained(tmp_path)
    saved, kept = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, EXPERIMENTS / experiment))
    saved.pop("peft_version")
    assert sorted(saved.pop("target_modules")) == kept.pop("target_modules")
    assert kept == saved


def test_parameters_on_the_harness_s_model() -> None:
    sizes = {}
    for name in TRAINED:
        sizes[name], total = get_peft_model(llama_3_2_3b(), of(name)).get_nb_trainable_parameters()
        assert total - sizes[name] == 3_212_749_824  # what the harness reports of the model's own
    assert sizes == TRAINED
    lora = LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM")
    adapted = get_peft_model(llama_3_2_3b(), lora)
    assert adapted.get_nb_trainable_parameters()[0] == 9_175_040 == TRAINED["wara/llama-3.2-3B-R64"]
    assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("experiment", TRAINED)
def test_a_run_trains_evaluates_saves_and_logs(experiment: str, tmp_path: Path) -> None:
    """In the harness's order: a loss before training, steps with evaluations between, a file, a log."""
    torch.manual_seed(0)
    base = llama(vocab_size=64, hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6)
    config = of(experiment)
    model = get_peft_model(base.to(torch.bfloat16), config, autocast_adapter_dtype=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.randint(1, 64, (4, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generation = GenerationConfig(max_length=16, pad_token_id=0)

    def loss_in_inference_mode() -> float:
        model.eval()
        with torch.inference_mode():
            model.generate(**batch, generation_config=generation)
            loss = model(**batch, labels=ids, pad_token_id=0).loss.item()
        model.train()
        return loss

    losses = [loss_in_inference_mode()]
    for _ in range(2):
        for _ in range(4):
            optimizer.zero_grad()
            model(**batch, labels=ids.clone(), num_items_in_batch=ids.numel()).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses.append(loss_in_inference_mode())
    assert losses[0] > losses[1] > losses[2]  # what is evaluated is the adapter as it is then
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 4 * sum(map(torch.Tensor.numel, trained))
    logged = {
        key: list(value) if isinstance(value, set) else value
        for key, value in model.peft_config["default"].to_dict().items()
    }
    assert json.loads(json.dumps(logged))["peft_type"] == "WARA"


@pytest.mark.slow
def test_the_line_that_run_py_needs_is_enough_and_needed() -> None:
    line = re.search(r"```python\n(.+)\n```", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert line is not None
    read = f"""
from peft import PeftConfig
{{}}
print(type(PeftConfig.from_pretrained({str(EXPERIMENTS / next(iter(TRAINED)))!r})).__name__)
"""
    with_line, without = (run_python("-c", read.format(added)) for added in (line[1], ""))
    assert with_line.stdout.strip() == "WaRAConfig", with_line.stderr
    assert without.returncode != 0
