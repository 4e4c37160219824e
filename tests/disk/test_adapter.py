"""A saved adapter by itself: what it says of the adapter in memory, and what is refused."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTModel

from tests.references import Chain, Mlp
from wara_peft import WaRAConfig, save_as_lora, to_lora
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.disk.checkpoints.tensors import TensorInfo
from wara_peft.inspection.saved_adapter import inspect_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(path: Path, model: nn.Module | None = None, **fields) -> nn.Module:
    fields = {"target_modules": ["up", "down"], "wavelet": "db2", "wara_alpha": 3, **fields}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "levels=. is more than is useful")
        adapted = get_peft_model(model or Mlp(), WaRAConfig(init_weights=False, **fields))
    adapted.save_pretrained(path)
    return adapted


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"levels": 2, "use_rslora": True, "alpha_pattern": {"up": 9}},
        {"form": "shared", "rank_pattern": {"up": 7}},
        {"subband_ranks": {"aa0": 2, "dd1": 0}, "rank_pattern": {"down": {"aa1": 0}}},
    ],
)
def test_updates_are_those_of_the_model(tmp_path, fields):
    layers = saved(tmp_path, **fields).base_model.model
    adapter = SavedAdapter(tmp_path)
    assert list(adapter.modules) == ["down", "up"]
    assert not adapter.others
    for name in adapter.modules:
        update = adapter.update(name)
        torch.testing.assert_close(update.dense(), getattr(layers, name).get_delta_weight("default"))
        assert adapter.weight_shape(name) == tuple(getattr(layers, name).weight.shape)


def test_what_else_it_holds(tmp_path):
    saved(tmp_path, bias="wara_only", modules_to_save=["head"])
    adapter = SavedAdapter(tmp_path)
    shapes = {key: info.shape for key, info in adapter.others.items()}
    assert shapes == {"up.base_layer.bias": (20,), "head.weight": (3, 12), "head.bias": (3,)}
    assert torch.equal(adapter.other("head.weight"), load_file(tmp_path / WEIGHTS)["base_model.model.head.weight"])


@pytest.mark.parametrize(
    ("make", "groups"), [(lambda: nn.Conv1d(6, 8, 3), 1), (lambda: nn.Conv2d(6, 8, 3, groups=2), 2)]
)
def test_groups_of_a_convolution_are_recorded(tmp_path, make, groups):
    model = nn.Sequential()
    model.add_module("conv", make())
    adapted = saved(tmp_path, model, target_modules=["conv"])
    adapter = SavedAdapter(tmp_path)
    assert adapter.modules["conv"].groups == groups
    delta = adapted.base_model.model.conv.get_delta_weight("default")
    torch.testing.assert_close(adapter.update("conv").dense(), delta)


@pytest.mark.parametrize(
    ("fields", "lost", "said"),
    [
        ({"modules_to_save": ["head"]}, ("head.weight", "head.bias"), "lacks 'head', which `modules_to_save`"),
        ({"modules_to_save": ["head"], "bias": "all"}, ("head.weight", "model.head.bias"), "lacks 'head', which"),
        (
            {"target_modules": "all-linear", "bias": "wara_only", "model": lambda: Chain(depth=3)},
            ("layers.1.base_layer.bias",),
            "lacks the bias of 'layers.1', which trained",
        ),
        (
            {"target_modules": ["up"], "bias": "wara_only", "model": lambda: nn.ModuleList([Mlp(), Mlp(), Mlp()])},
            ("1.up.base_layer.bias",),
            "lacks the bias of '1.up', which trained",
        ),
        (
            {
                "target_modules": ["up"],
                "bias": "all",
                "model": lambda: nn.ModuleDict({"layers": nn.ModuleList([Mlp(), Mlp()])}),
            },
            ("layers.1.up.base_layer.bias",),
            "lacks the bias of 'layers.1.up', which trained",
        ),
    ],
)
def test_what_the_config_promises_must_be_there(tmp_path, fields, lost, said):
    make = fields.pop("model", Mlp)
    saved(tmp_path, make(), **fields)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "bias='all' in the config says .* has none of 'down'")  # nor has the model
        SavedAdapter(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    kept = {key: value for key, value in tensors.items() if not key.endswith(lost)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=said):
        SavedAdapter(tmp_path)


@pytest.mark.parametrize("bias", ["all", "wara_only"])
def test_no_bias_at_all(tmp_path, bias):
    saved(tmp_path, target_modules=["up"], bias=bias)
    edit_weights(lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith("bias")])(tmp_path)
    with pytest.raises(ValueError, match=f"lacks the bias of 'up', which trained with bias='{bias}'"):
        SavedAdapter(tmp_path)


def test_heads_that_peft_adds_to_the_config(tmp_path):
    """It adds the names of all heads, and a model has one."""
    base = BertForSequenceClassification(
        BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    model = saved(tmp_path, base, target_modules=["query"], task_type="SEQ_CLS")
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    assert set(SavedAdapter(tmp_path).others) == {"classifier.weight", "classifier.bias"}


def test_what_peft_would_load_is_kept(tmp_path):
    saved(tmp_path)
    edit_weights(lambda tensors: tensors.update({"base_model.model.head.weight": torch.full((3, 12), 2.0)}))(tmp_path)
    with pytest.warns(UserWarning, match="holds 'head.weight', of which its config says nothing. It is kept"):
        adapter = SavedAdapter(tmp_path)
    assert adapter.unmentioned == {"head.weight"}
    assert adapter.other("head.weight").unique() == 2.0
    with pytest.warns(UserWarning, match="says nothing"), pytest.warns(UserWarning, match="in full .'head.weight'"):
        save_as_lora(tmp_path / "lora", tmp_path)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path / "lora")
    assert loaded.base_model.model.head.weight.unique() == 2.0


def test_a_module_that_counts(tmp_path):
    """A batch norm counts its batches, in an integer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = saved(tmp_path, model, target_modules=["0"], modules_to_save=["1"])
    adapter = SavedAdapter(tmp_path)
    assert adapter.others["1.num_batches_tracked"] == TensorInfo((), "I64")
    with pytest.warns(UserWarning, match="PEFT loads all of this LoRA"):
        _, state_dict = to_lora(tmp_path)
    assert state_dict["base_model.model.1.num_batches_tracked"].dtype == torch.int64


class Explosive:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def edit_config(**fields):
    def edit(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**config, **fields}))

    return edit


def edit_weights(change):
    def edit(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return edit


def cut_short(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-40])


def pickled_beside(path: Path) -> None:
    (path / WEIGHTS).rename(path / "adapter_model.bin")


KEY = "base_model.model.up.wara_A.level1"
# ruff: noqa: E501  # a table reads best with one line a row
# what is wrong, how it comes about, what is said
BROKEN = {
    "pickle in place of safetensors": (pickled_beside, "is a pickle, which may run any code and is not opened"),
    "cut short": (cut_short, "is not a complete safetensors file"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), "There is no file"),
    "no config": (lambda path: (path / CONFIG).unlink(), "There is no file"),
    "config not JSON": (lambda path: (path / CONFIG).write_text("{"), "is not JSON"),
    "config nested too deep": (lambda path: (path / CONFIG).write_text("[" * 100_000), "is not JSON"),
    "config a list": (lambda path: (path / CONFIG).write_text("[]"), "is not a JSON object"),
    "LoRA": (edit_config(peft_type="LORA"), "its peft_type is 'LORA'"),
    "unknown wavelet": (edit_config(wavelet="haaar"), "wavelet='haaar' is not a wavelet"),
    "giant rank": (edit_config(r=10**15), "r=1000000000000000 must be an int from . to 65536"),
    "giant rank, tiny": (edit_config(r=10**4, form="tiny"), "but its config asks for|lacks 'down.wara_basis"),
    "giant rank, grid": (edit_config(r=10**4, form="grid"), "but its config asks for|lacks 'down.wara_A.weight'"),
    "giant shapes": (edit_config(module_shapes={"up": ["Linear", 10**18, 10**18]}), "was expected"),
    "large shapes": (edit_config(module_shapes={"up": ["Linear", 10**9, 10**9]}), r"asks for \(16, 500000000\)"),
    "giant groups": (edit_config(module_shapes={"up": ["Conv1d", 10**9, 4, 10**9]}), "no 1-d kernel"),
    "giant rank of a subband": (edit_config(subband_ranks={"aa1": 10**15}), "must be an int from . to 65536"),
    "giant levels": (edit_config(levels=10**9), "levels=1000000000 must be an int from 1 to 64"),
    "rank of a wrong type": (edit_config(r="4"), "r='4' must be an int"),
    "pattern of a wrong type": (edit_config(rank_pattern=[4]), "adapter_config.json"),
    "no shapes": (edit_config(module_shapes=None), "module_shapes .* is empty"),
    "shapes of a wrong form": (edit_config(module_shapes={"up": ["Linear", 20]}), "was expected"),
    "shapes of a wrong kind": (edit_config(module_shapes={"up": ["LSTM", 20, 12]}), "names the kind .LSTM. for .up.; it is one of Linear"),
    "shapes not positive": (edit_config(module_shapes={"up": ["Linear", 20, -12]}), "was expected"),
    "other shapes": (edit_config(module_shapes={"up": ["Linear", 20, 100]}), r"asks for \(16, 50\)"),
    "module that is not saved": (
        edit_config(module_shapes={"up": ["Linear", 20, 12], "gone": ["Linear", 4, 4]}),
        "lacks 'gone.wara_A.level1'",
    ),
    "factors that point nowhere": (edit_config(module_shapes={"up": ["Linear", 20, 12]}), "holds 'down.wara_A.level1'"),
    "factor that points nowhere": (edit_weights(lambda t: t.update({"base_model.model.x.wara_A.level1": t[KEY] * 1})), "'x.wara_A.level1'"),
    "key without the prefix": (edit_weights(lambda t: t.update({"x": t[KEY] * 1})), "the key 'x'"),
    "missing factor": (edit_weights(lambda t: t.pop(KEY)), "lacks 'up.wara_A.level1'"),
    "wrong shape": (edit_weights(lambda t: t.update({KEY: t[KEY][:-1].clone()})), r"of shape \(15, 6\)"),
    "integers": (edit_weights(lambda t: t.update({KEY: t[KEY].int()})), "of dtype I32; one of F64, F32, F16, BF16"),
    "float8": (edit_weights(lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)})), "of dtype F8_E4M3; one of"),
    "float8 beside the adapter": (
        edit_weights(lambda t: t.update({"base_model.model.lm_head.weight": t[KEY].to(torch.float8_e5m2)})), "of dtype F8_E5M2"
    ),
    "NaN": (edit_weights(lambda t: t[KEY].view(-1)[3].fill_(float("nan"))), "'up.wara_A.level1' holds values that are not"),
    "infinity": (edit_weights(lambda t: t[KEY].view(-1)[3].fill_(float("inf"))), "holds values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_adapters_are_refused(tmp_path, what):
    saved(tmp_path)
    edit, message = BROKEN[what]
    edit(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        adapter = SavedAdapter(tmp_path)
        for name in adapter.modules:
            adapter.update(name)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_nothing_is_unpickled(tmp_path, name):
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    bomb = Explosive()
    bomb.path = str(tmp_path / "exploded")
    (tmp_path / name).write_bytes(pickle.dumps(bomb))
    with pytest.raises((ValueError, FileNotFoundError)):
        SavedAdapter(tmp_path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert (tmp_path / "exploded").exists()  # so it would have


def test_no_such_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter directory"):
        SavedAdapter(tmp_path / "nowhere")


def test_modules_come_in_natural_order(tmp_path):
    saved(tmp_path, nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), target_modules="all-linear", r=1)
    assert list(SavedAdapter(tmp_path).modules) == [str(index) for index in range(12)]


TINY = {"form": "tiny", "r": 3, "target_modules": ["up", "down"]}


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_tiny(tmp_path, core):
    layers = saved(tmp_path, core=core, **TINY).base_model.model
    adapter = SavedAdapter(tmp_path)
    for name in adapter.modules:
        layer = getattr(layers, name)
        torch.testing.assert_close(adapter.update(name).dense(), layer.get_delta_weight("default"))
        assert adapter.parameters(name) == sum(p.numel() for n, p in layer.named_parameters() if "wara_core" in n)
        # ‖Σ_s S B_s A_s S‖² = Σ_s ‖B_s A_s‖² at these even sizes
        energy = sum((b @ a).square().sum() for a, b in adapter.coefficients(name).values())
        torch.testing.assert_close(energy, layer.get_delta_weight("default").square().sum())
    edit_weights(lambda tensors: tensors.pop("base_model.model.up.wara_core.aa1"))(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 'up\.wara_core\.aa1'"):
        SavedAdapter(tmp_path)


def test_tiny_without_its_basis(tmp_path):
    saved(tmp_path, save_basis=False, **TINY)
    with pytest.raises(ValueError, match="saved without its basis"):
        SavedAdapter(tmp_path)


@pytest.mark.parametrize("grid_pairs", ["separate", "shared"])
def test_grid_has_no_update_but_a_description(tmp_path, grid_pairs):
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = saved(tmp_path, ViTModel(config), form="grid", grid_pairs=grid_pairs, target_modules=["fc1"])
    adapter = SavedAdapter(tmp_path)
    (name,) = adapter.modules
    with pytest.raises(ValueError, match=r"form='grid', and in module .*fc1.* it mixes tokens"):
        adapter.update(name)
    layer = model.base_model.model.get_submodule(name)
    assert adapter.parameters(name) == sum(p.numel() for n, p in layer.named_parameters() if "wara_" in n)
    assert adapter.rank(name) == layer.total_rank("default")
    (report,) = inspect_adapter(adapter).modules
    assert report.lora_parameters is None
    assert list(report.energy) == ["aa1", "ad1", "da1", "dd1"]
    rows, columns = (getattr(layer, f"wara_{side}")["default"].weight for side in "AB")
    product = columns[:, :4] @ rows[:4] * layer.scaling["default"]
    assert report.energy["aa1"] == pytest.approx(float(product.detach().square().sum()), rel=1e-5)
