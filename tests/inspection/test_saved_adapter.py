"""What `inspect_adapter` reports, against the adapter in memory and its dense ΔW."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.cases import SMALL, each_case
from tests.references import Mlp, transform
from wara_peft import WaRAConfig, to_lora
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.inspection.saved_adapter import AdapterReport, ModuleReport, inspect_adapter
from wara_peft.layers.base import WaRALayer
from wara_peft.layers.lookup import layers_of


def check_by_pywavelets(module: ModuleReport, layer: WaRALayer, report: AdapterReport) -> None:
    """Energies are those of the subbands of ΔW, where all axes can be halved, so that subbands are orthogonal."""
    if any(side % 2**report.levels for side in layer.shape.lengths):
        return
    delta = layer.get_delta_weight("default", torch.float64).detach()
    delta = delta.mT if layer.kind.keeps_in_first else delta
    delta = delta.flatten(2).permute(2, 0, 1) if layer.kind.kernel_dimensions else delta  # a matrix for each place
    expected = Counter()
    for matrix in delta.reshape(-1, *layer.shape.lengths):
        bands = transform(matrix.numpy(), report.wavelet, report.levels)
        expected.update({band: (value**2).sum() for band, value in bands.items()})
    assert module.energy == pytest.approx({band: expected[band] for band in module.energy}, rel=1e-5)
    assert sum(module.energy.values()) == pytest.approx(expected.total(), rel=1e-5)


@pytest.mark.filterwarnings(
    "ignore:PEFT loads all|PEFT's LoRA |Neither PEFT|If its|This adapter is|levels=|bias='",
    "ignore:Model with `tie_word|Could not find a config file|Setting `save_embedding_layers`",
)
@each_case("read", parts=SMALL)
def test_report(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    report = inspect_adapter(SavedAdapter(tmp_path))
    layers = {name.removeprefix("base_model.model."): layer for name, layer in layers_of(model, "default").items()}
    layers = {name: layer for name, layer in layers.items() if "default" not in layer.tied_to}
    assert [module.name for module in report.modules] == sorted(layers)
    energies = Counter()
    for module in report.modules:
        layer = layers[module.name]
        assert module.kind in case.kinds
        assert module.parameters == sum(p.numel() for name, p in layer.named_parameters() if "wara_" in name)
        assert module.rank == layer.total_rank("default") * module.groups
        coefficients = layer.forms["default"].coefficients(layer.parts("default"))
        assert module.ranks == {band: columns.shape[-1] for band, (_, columns) in coefficients.items()}
        for band, (rows, columns) in coefficients.items():
            rows = rows.flatten(1) if layer.kind.kernel_dimensions else rows  # others may have experts first
            product = layer.scaling["default"] * columns.double() @ rows.double()
            assert module.energy[band] == pytest.approx(product.square().sum().item(), rel=1e-5)
            energies[band] += module.energy[band]
        if case.can("export") and "aa0" not in coefficients:
            check_by_pywavelets(module, layer, report)
    for band, energy in energies.items():
        assert report.energy_shares()[band] == pytest.approx(energy / energies.total(), rel=1e-5)
    shares = report.level_shares()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares.get("approximation") == report.energy_shares().get(f"aa{report.levels}")
    assert json.loads(json.dumps(report.as_dict()))["rank"] == report.rank
    if case.can("export"):
        config, state_dict = to_lora(model)
        assert report.rank == config.r
        factors = [value.numel() for key, value in state_dict.items() if ".lora_" in key]
        assert report.lora_parameters == sum(factors)


def test_a_new_adapter_has_no_energy(tmp_path):
    get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], modules_to_save=["head"])).save_pretrained(tmp_path)
    report = inspect_adapter(SavedAdapter(tmp_path))
    assert set(report.energy_shares().values()) == {0.0}
    assert report.others == ["head.bias", "head.weight"]


def test_groups_of_a_convolution(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)), WaRAConfig(target_modules=["0"], r=1))
    model.save_pretrained(tmp_path)
    (module,) = inspect_adapter(SavedAdapter(tmp_path)).modules
    with pytest.warns(UserWarning, match="PEFT loads all"):
        config, state_dict = to_lora(tmp_path)
    assert module.groups == 2
    # PEFT groups lora_B, which so has a column for each rank of its group
    assert module.rank == config.r == 8
    assert module.lora_parameters == sum(value.numel() for value in state_dict.values())


@pytest.mark.filterwarnings("ignore:PEFT loads all")
def test_the_rank_is_that_of_the_export(tmp_path):
    """Groups of convolutions share it evenly, and smaller modules are filled up to it."""
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 9, 1, groups=3), nn.Conv2d(9, 4, 1))
    pattern = {"0": 2, "1": {"aa1": 1, "ad1": 0, "da1": 0, "dd1": 0}, "2": 3}
    model = get_peft_model(model, WaRAConfig(target_modules=["0", "1", "2"], rank_pattern=pattern))
    model.save_pretrained(tmp_path)
    report = inspect_adapter(SavedAdapter(tmp_path))
    config, state_dict = to_lora(tmp_path)
    assert [module.rank for module in report.modules] == [16, 3, 12]
    assert report.rank == config.r == 18  # the next multiple of 2 and 3
    assert report.lora_parameters == sum(value.numel() for value in state_dict.values())
    assert report.as_dict()["lora_parameters"] == report.lora_parameters


def test_plot_takes_names_as_they_are(tmp_path):
    model = nn.ModuleDict({"$\\frac{$": nn.Linear(4, 4)})
    get_peft_model(model, WaRAConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    inspect_adapter(SavedAdapter(tmp_path)).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_shows_modules_by_subbands(tmp_path):
    get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"], init_weights=False)).save_pretrained(tmp_path)
    report = inspect_adapter(SavedAdapter(tmp_path))
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="Format 'abc' is not supported"):
        report.plot(tmp_path / "plot.abc")
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*missing' to write 'plot.png' into"):
        report.plot(tmp_path / "missing" / "plot.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder.png' is a folder; name an image file"):
        report.plot(tmp_path / "folder.png")
    assert not [path.name for path in tmp_path.iterdir() if "abc" in path.name or path.name.startswith(".")]


def test_progress_goes_over_all_modules(tmp_path):
    get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"])).save_pretrained(tmp_path)
    seen = []
    inspect_adapter(SavedAdapter(tmp_path), track=lambda names: [seen.append(n) or n for n in names])
    assert seen == ["down", "up"]
