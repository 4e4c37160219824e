"""What `inspect_adapter` reports, against the adapter in memory and its dense ΔW."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model
from torch import nn

from tests.references import Mlp, dense_coefficients
from wara_peft import WaRAConfig, to_lora
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.inspection.saved_adapter import inspect_adapter

CASES = {
    "haar": {"wara_alpha": 5},
    "two levels": {"levels": 2, "use_rslora": True},
    "shared": {"form": "shared", "wavelet": "db2"},
    "unequal ranks": {"rank_pattern": {"up": {"aa1": 9, "dd1": 0}}},
}


@pytest.mark.filterwarnings("ignore:levels=. is more than is useful")
@pytest.mark.parametrize("case", CASES)
def test_report(case, tmp_path):
    fields = {"target_modules": ["up", "down"], **CASES[case]}
    model = get_peft_model(Mlp(), WaRAConfig(init_weights=False, **fields))
    model.save_pretrained(tmp_path)
    report = inspect_adapter(SavedAdapter(tmp_path))
    assert [module.name for module in report.modules] == ["down", "up"]
    state_dict = to_lora(model)[1]
    assert (
        report.rank
        == max(module.rank for module in report.modules)
        == state_dict["base_model.model.up.lora_A.weight"].shape[0]
    )
    energies = {}
    for module in report.modules:
        layer = model.base_model.model.get_submodule(module.name)
        adapter = [p for name, p in layer.named_parameters() if "wara_" in name]
        assert module.parameters == sum(p.numel() for p in adapter)
        assert module.lora_parameters == module.rank * (layer.in_features + layer.out_features)
        assert (module.kind, module.out_features, module.in_features) == (
            "Linear",
            layer.out_features,
            layer.in_features,
        )
        assert module.ranks == layer.wara_A["default"].ranks
        scaling = layer.scaling["default"]
        for band, coefficients in dense_coefficients(layer).items():
            expected = (scaling * coefficients**2 * scaling).sum()
            assert module.energy[band] == pytest.approx(expected, rel=1e-5)
            energies[band] = energies.get(band, 0.0) + expected
        # Lengths here are multiples of four, so the subbands are orthogonal.
        delta = layer.get_delta_weight("default").double()
        assert sum(module.energy.values()) == pytest.approx(float(delta.square().sum()), rel=1e-5)
    for band, energy in energies.items():
        assert report.energy_shares()[band] == pytest.approx(energy / sum(energies.values()), rel=1e-5)
    assert sum(report.level_shares().values()) == pytest.approx(1.0)
    assert report.level_shares()["approximation"] == report.energy_shares()[f"aa{report.levels}"]
    assert json.loads(json.dumps(report.as_dict()))["rank"] == report.rank


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
