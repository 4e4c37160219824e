"""What `inspect_adapter` reports, against the adapter in memory and its dense ΔW."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model
from torch import nn

from tests.references import Mlp, dense_coefficients
from wara_peft import WaRAConfig, to_lora
from wara_peft.disk.adapter import SavedAdapter
from wara_peft.inspection import inspect_adapter

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
    # PEFT groups lora_B, which so has a column for each rank of its group
    assert module.rank == config.r == 8
    assert module.lora_parameters == sum(value.numel() for value in state_dict.values())


def test_plot_shows_modules_by_subbands(tmp_path):
    get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"], init_weights=False)).save_pretrained(tmp_path)
    report = inspect_adapter(SavedAdapter(tmp_path))
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="Format 'abc' is not supported"):
        report.plot(tmp_path / "plot.abc")
    assert not [path.name for path in tmp_path.iterdir() if "abc" in path.name]


def test_progress_goes_over_all_modules(tmp_path):
    get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"])).save_pretrained(tmp_path)
    seen = []
    inspect_adapter(SavedAdapter(tmp_path), track=lambda names: [seen.append(n) or n for n in names])
    assert seen == ["down", "up"]
