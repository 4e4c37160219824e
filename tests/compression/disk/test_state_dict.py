"""State dicts of compressed models that are not transformers' load into dense models, or change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.compression.disk.test_names import equal
from tests.compression.models import TwoLayers, llama
from wara_peft.attention import LowRankMultiheadAttention
from wara_peft.compression import (
    SVD,
    LowRankConv,
    LowRankLinear,
    SharedBaseLinear,
    TrainedRankPruning,
    compress,
    factorize,
    load_factorized,
    low_rank_plus_sparse,
    share_bases,
)
from wara_peft.factorized.saved import FACTORIZED


def convolutions() -> nn.Module:
    """A network that is built as timm's are: convolutions, norms, and a linear head."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(256, 8),
    ).eval()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def pruned(model: nn.Module) -> None:
    pruning = TrainedRankPruning(energy=0.5)
    pruning.start(model)
    pruning.finish()


def shared(model: nn.Module) -> None:
    share_bases(model, [[f"layers.{index}.linear1" for index in (0, 1)]], 0.5)


def outputs(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    if hasattr(model, "conv_in"):
        return model(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 12)).sample
    shape = {nn.Sequential: (2, 3, 6, 6), nn.TransformerEncoder: (2, 5, 16)}[type(model)]
    return model(torch.randn(shape))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], type[nn.Module]]] = {
    "convolutions": (convolutions, pruned, LowRankConv),
    "an encoder's attention": (encoder, lambda model: factorize(model, 0.5), LowRankMultiheadAttention),
    "an encoder, sparse": (
        encoder,
        lambda model: low_rank_plus_sparse(model, 2, 0.1, ["linear1", "linear2"]),
        nn.Module,
    ),
    "shared bases": (encoder, shared, SharedBaseLinear),
    "diffusers": (unet, lambda model: compress(model, SVD(0.6), show_progress_bar=False), LowRankLinear),
}


@pytest.mark.parametrize("case", CASES)
def test_a_dense_model_becomes_the_compressed_one(case: str, tmp_path: Path) -> None:
    make, method, kind = CASES[case]
    model = make()
    method(model)
    model.eval()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt")
    loaded = make()
    names = load_factorized(loaded, state)
    assert sorted(names) == sorted(name for name, layer in model.named_modules() if isinstance(layer, FACTORIZED))
    assert equal(loaded, model) and repr(loaded) == repr(model)
    assert any(isinstance(module, kind) for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(outputs(loaded), outputs(model))
    # A shared base is one parameter again.
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == {
        name: parameter.requires_grad for name, parameter in model.named_parameters()
    }


def test_an_encoder_with_padding_computes_after_loading() -> None:
    """PyTorch's encoder would ask the attention for `in_proj_weight`, if nested tensors were on."""
    model = encoder()
    factorize(model, 0.5)
    loaded = encoder()
    load_factorized(loaded, model.state_dict())
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        result = loaded(x, src_key_padding_mask=mask)
        assert torch.equal(result, model(x, src_key_padding_mask=mask))
        single = loaded(x[1:, :3])
    torch.testing.assert_close(result[1:, :3], single)


def test_dtype_and_frozen_layers_are_those_of_the_dense_model() -> None:
    model = TwoLayers()
    factorize(model, 0.5)
    loaded = TwoLayers().double().requires_grad_(False)
    load_factorized(loaded, model.state_dict())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert equal(loaded, model.double())


def test_files_of_save_pretrained_load_too(tmp_path: Path) -> None:
    model = llama()
    factorize(model, 0.5)
    model.save_pretrained(tmp_path)
    loaded = llama()
    load_factorized(loaded, load_file(tmp_path / "model.safetensors"))
    assert equal(loaded, model)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "lacks a factor": (lambda state: state.pop("3.up.weight"), "lacks '3.weight'"),
    "lacks a dense tensor": (lambda state: state.pop("1.weight"), r"it lacks '1\.weight'"),
    "has another": (lambda state: state.update(spare=torch.zeros(2)), "it has 'spare', and the model has not"),
    "has a wrong shape": (
        lambda state: state.update({"1.weight": torch.zeros(3)}),
        r"'1\.weight' has the shape \(3,\), and \(16,\)",
    ),
    "has a wrong factor": (lambda state: state.update({"3.up.weight": torch.zeros(3, 3, 1, 1)}), "3.up.weight"),
    "has a dense weight too": (lambda state: state.update({"3.weight": torch.zeros(16, 16, 3, 3)}), "dense weight"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_dict_that_does_not_fit_changes_nothing(damage: str) -> None:
    model = convolutions()
    pruned(model)
    assert isinstance(model[3], LowRankConv)
    state = model.state_dict()
    change, message = DAMAGE[damage]
    change(state)
    loaded, dense = convolutions(), convolutions()
    dense.load_state_dict(loaded.state_dict())
    before = list(loaded.modules())
    with pytest.raises(ValueError, match=message):
        load_factorized(loaded, state)
    assert all(one is other for one, other in zip(before, loaded.modules(), strict=True)) and equal(loaded, dense)


def test_an_encoder_that_was_refused_keeps_its_attention_and_nested_tensors() -> None:
    model = encoder()
    factorize(model, 0.5)
    state = model.state_dict()
    del state["layers.1.norm2.weight"]
    loaded = encoder()
    before, uses = list(loaded.modules()), loaded.use_nested_tensor
    with pytest.raises(ValueError, match=r"lacks 'layers\.1\.norm2\.weight'"):
        load_factorized(loaded, state)
    assert list(loaded.modules()) == before and loaded.use_nested_tensor == uses


def test_what_cannot_be_loaded() -> None:
    with pytest.raises(ValueError, match=r"no factors for a layer of Sequential.*model\.load_state_dict"):
        load_factorized(convolutions(), convolutions().state_dict())
    model = convolutions()
    pruned(model)
    with torch.device("meta"):
        empty = convolutions()
    with pytest.raises(ValueError, match=r"on the meta device.*to_empty"):
        load_factorized(empty, model.state_dict())
    with pytest.raises(TypeError, match="state_dict must be a mapping"):
        load_factorized(convolutions(), "model.safetensors")
