"""Models with low-rank and sparse layers: trained, resumed to the bit, saved, merged, and refused input."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.compression.models import TwoLayers, batches, for_causal, llama
from wara_peft import WaRAConfig
from wara_peft.compression import (
    LowRankPlusSparseLinear,
    factorize,
    load_compressed,
    low_rank_plus_sparse,
    save_compressed,
    to_dense,
)
from wara_peft.factorized.saved import FACTORIZED


def converted(seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    low_rank_plus_sparse(model, 2, 0.1, alpha=4, seed=seed)
    return model


def test_layers_and_counts() -> None:
    model = llama()
    before = sum(parameter.numel() for parameter in model.parameters())
    result = low_rank_plus_sparse(model, 2, 0.1)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankPlusSparseLinear)}
    assert list(layers) == list(result.replaced) and len(layers) == 14 and "lm_head" not in layers
    expected = before
    for layer in layers.values():
        m, n = layer.out_features, layer.in_features
        assert layer.nonzeros == int(0.1 * m * n)
        expected += 2 * (m + n) + layer.nonzeros - m * n
    assert (result.parameters_before, result.parameters_after) == (before, expected)
    supports = [tuple(layer.indices.tolist()) for layer in layers.values()]
    assert len(set(supports)) == 14


def test_a_bias_stays_and_tied_layers_are_left() -> None:
    model = TwoLayers()
    bias = model.first.bias
    low_rank_plus_sparse(model, 2, 0.1)
    assert model.first.bias is bias and model.second.bias is None
    tied = TwoLayers(16, 16)
    tied.second.weight = tied.first.weight
    result = low_rank_plus_sparse(tied, 2, 0.1)
    assert list(result.left) == ["first", "second"] and not result.replaced and type(tied.first) is nn.Linear


def arguments(path: Path, steps: int, **fields: object) -> TrainingArguments:
    return TrainingArguments(
        path, max_steps=steps, save_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, seed=3,
        disable_tqdm=True, logging_steps=100, learning_rate=3e-3, lr_scheduler_type="constant", **fields,
    )  # fmt: skip


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    ids = torch.randint(3, 40, (count, 8))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.slow
def test_resuming_is_equal_to_the_bit(tmp_path: Path) -> None:
    whole = converted()
    Trainer(whole, arguments(tmp_path / "a", 6), train_dataset=rows()).train()
    part = converted()
    Trainer(part, arguments(tmp_path / "b", 3), train_dataset=rows()).train()
    resumed = converted(seed=99)  # with other places, until the checkpoint is there
    Trainer(resumed, arguments(tmp_path / "b", 6), train_dataset=rows()).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3")
    )
    start = converted().state_dict()
    found = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(found[name], value), name
        if name.endswith((".up", ".values", ".down")):
            assert not torch.equal(start[name], value)
    # What Trainer wrote loads without more.
    loaded = load_compressed(tmp_path / "b" / "checkpoint-6")
    batch = batches(1, labelled=False)[0]
    assert torch.equal(loaded(**batch).logits, resumed.eval()(**batch).logits)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trains_in_bfloat16(tmp_path: Path, gradient_checkpointing: bool) -> None:
    model = converted()
    data = for_causal(batches(1, labelled=False))[0]
    before = float(model(**data).loss)
    fields = {"bf16": True, "gradient_checkpointing": gradient_checkpointing}
    Trainer(model, arguments(tmp_path, 20, **fields), train_dataset=[
        {name: value[row] for name, value in data.items()} for row in range(4)
    ]).train()  # fmt: skip
    assert float(model.eval()(**data).loss) < before - 0.2


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = converted()
    for layer in model.modules():
        if isinstance(layer, LowRankPlusSparseLinear):
            nn.init.normal_(layer.up)
    save_compressed(model, tmp_path / "a")
    loaded = load_compressed(tmp_path / "a")
    batch = batches(1, labelled=False)[0]
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == {
        name: value.dtype for name, value in model.state_dict().items()
    }


def test_a_broken_support_is_refused(tmp_path: Path) -> None:
    model = converted()
    model.model.layers[1].mlp.up_proj.indices[0] = 4000
    save_compressed(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj': the support must be places from 0 to 511"):
        load_compressed(tmp_path / "a")


def test_to_dense_of_all_kinds() -> None:
    model = llama()
    factorize(model, 2, target_modules=["q_proj"])
    low_rank_plus_sparse(model, 2, 0.1, ["up_proj", "down_proj"])
    batch = batches(1, labelled=False)[0]
    with torch.no_grad():
        before = model(**batch).logits
        names = to_dense(model)
        assert len(names) == 6 and not any(isinstance(module, FACTORIZED) for module in model.modules())
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-5, atol=1e-5)
    plain = llama()
    plain.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="no factorised layer"):
        to_dense(model)


@pytest.mark.parametrize("config", [LoraConfig, WaRAConfig])
def test_adapters_are_refused_by_name(config: type) -> None:
    model = converted()
    with pytest.raises((ValueError, TypeError), match="LowRankPlusSparseLinear"):
        get_peft_model(model, config(target_modules=["q_proj"]))
    to_dense(model)
    get_peft_model(model, config(target_modules=["q_proj"]))


@pytest.mark.parametrize("density", [0, 0.0, 1.0, 1, -0.1, True])
def test_density_out_of_range(density: float) -> None:
    with pytest.raises(ValueError, match=f"density={density!r} must be a float between 0 and 1"):
        low_rank_plus_sparse(llama(), 2, density)


@pytest.mark.parametrize(("rank", "density", "named"), [(7, 0.2, "rank=7 and"), (2, 0.0001, "nonzeros=0")])
def test_a_rank_or_density_that_does_not_fit_is_named_and_changes_nothing(
    rank: int, density: float, named: str
) -> None:
    model = llama()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=rf"'model\.layers\.0\..*_proj' .*density={density}: {named}"):
        low_rank_plus_sparse(model, rank, density)
    assert repr(model) == repr(before)
