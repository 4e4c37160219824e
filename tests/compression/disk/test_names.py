"""Models whose tensors transformers renames or fuses when it writes them: what was compressed loads all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import NomicBertConfig, NomicBertModel, PreTrainedModel, ViTModel
from transformers.core_model_loading import revert_weight_conversion

from tests.compression.models import vit
from wara_peft import WaRAConfig
from wara_peft.compression import (
    SVD,
    LayerStatistics,
    LowRankLinear,
    OneShotDictionary,
    StraightThroughFactorizer,
    TrainedRankPruning,
    calibrate,
    compress,
    factorize,
    factorize_linear,
    load_compressed,
    low_rank_plus_sparse,
    save_compressed,
    share_bases,
    straight_through,
)
from wara_peft.compression.disk import model as disk_model
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.factorized import saved


def equal(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    found = one.state_dict()
    return found.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in found.items())


def after_pruning(model: nn.Module) -> None:
    pruning = TrainedRankPruning(energy=0.5)
    pruning.start(model)
    pruning.finish()


def after_straight_through(model: nn.Module) -> None:
    straight_through(model, 8, 4, 2, target_modules=["fc1"])
    training = StraightThroughFactorizer()
    training.start(model)
    training.finish()


def seen(model: nn.Module) -> dict[str, LayerStatistics]:
    return calibrate(model, [{"pixel_values": torch.randn(40, 1, 8, 8)}], show_progress_bar=False)


METHODS: dict[str, Callable[[nn.Module], object]] = {
    "svd": lambda model: compress(model, SVD(0.6), show_progress_bar=False),
    "dictionary": lambda model: compress(model, OneShotDictionary(0.6), seen(model), show_progress_bar=False),
    "SLTrain": lambda model: low_rank_plus_sparse(model, 2, 0.1),
    "TRP": after_pruning,
    "DSFormer": after_straight_through,
    "shared": lambda model: share_bases(model, [[f"vit.layers.{index}.mlp.fc1" for index in (0, 1)]], 0.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("write", [save_compressed, lambda model, path: model.save_pretrained(path)])
def test_of_a_vit_loads(method: str, write: Callable[[PreTrainedModel, Path], None], tmp_path: Path) -> None:
    model = vit()
    METHODS[method](model)
    model.eval()
    write(model, tmp_path / "a")
    loaded = load_compressed(tmp_path / "a")
    assert equal(loaded, model) and repr(loaded) == repr(model)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)


def test_a_body_without_a_head_loads(tmp_path: Path) -> None:
    model = ViTModel(vit().config).eval()
    factorize(model, 0.5)
    save_compressed(model, tmp_path / "a")
    loaded = load_compressed(tmp_path / "a")
    assert type(loaded) is ViTModel and isinstance(loaded.layers[0].mlp.fc1, LowRankLinear)
    assert equal(loaded, model)


def nomic() -> NomicBertModel:
    """A model whose q, k and v transformers fuses to one tensor on disk."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return NomicBertModel(NomicBertConfig(vocab_size=40, max_position_embeddings=32, **sizes)).eval()


def unequal_ranks(model: NomicBertModel) -> None:
    """Factorise q and k with different ranks, and leave v dense."""
    (attention,) = [module for module in model.modules() if hasattr(module, "q_proj")]
    attention.q_proj = factorize_linear(attention.q_proj, 2)
    attention.k_proj = factorize_linear(attention.k_proj, 5)
    saved.name_tensors(model)


def test_factors_of_tensors_that_are_fused_stay_apart(tmp_path: Path) -> None:
    dense = nomic()
    dense.save_pretrained(tmp_path / "dense")
    assert any("Wqkv" in key for key in load_file(tmp_path / "dense" / "model.safetensors"))
    unequal_ranks(dense)
    save_compressed(dense, tmp_path / "a")
    written = load_file(tmp_path / "a" / "model.safetensors")
    marks = {name for name, tensor in written.items() if not tensor.numel()}
    assert marks == {f"layers.0.self_attn.{name}_proj.weight" for name in "qk"}
    assert written.keys() - marks == dense.state_dict().keys()
    assert equal(load_compressed(tmp_path / "a"), dense)


@pytest.mark.parametrize("make", [nomic, vit])
def test_what_cannot_be_read_back_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make) -> None:
    model = make()
    factorize(model, 0.5)
    write = type(model).save_pretrained

    def lossy(self: PreTrainedModel, path: Path, **options: object) -> None:
        state = self.state_dict()
        name = next(name for name in state if name.endswith("down.weight"))
        write(self, path, state_dict={**state, name: state[name] + 1}, **options)

    monkeypatch.setattr(type(model), "save_pretrained", lossy)
    with pytest.raises(ValueError, match=r"of '.*down.weight' is not what the model has, so nothing is kept"):
        save_compressed(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    monkeypatch.setattr(disk_model, "keys_of_parameters", lambda *_: {})
    with pytest.raises(ValueError, match="is not what the model has"):
        save_compressed(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("renamed", [False, True])
def test_an_adapter_on_the_factors_merges_on_disk(tmp_path: Path, renamed: bool) -> None:
    model = vit()
    factorize(model, 0.5)
    save_compressed(model, tmp_path / "base")
    if renamed:  # as releases before wrote it
        file = tmp_path / "base" / "model.safetensors"
        del model._weight_conversions
        save_file(revert_weight_conversion(model, load_file(file)), file, metadata={"format": "pt"})
    targets = [name for name, _ in model.named_modules() if name.endswith(("fc1.down", "fc2.up", "v_proj.up"))]
    base = load_compressed(tmp_path / "base")
    adapted = get_peft_model(base, WaRAConfig(r=2, target_modules=targets, init_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    images = torch.randn(2, 1, 8, 8)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    keys = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert keys == load_file(tmp_path / "base" / "model.safetensors").keys()
    with torch.no_grad():
        expected = adapted.eval()(images).logits
        assert not torch.allclose(expected, model(images).logits, atol=1e-3)
        torch.testing.assert_close(load_compressed(tmp_path / "merged")(images).logits, expected, rtol=0, atol=1e-5)
