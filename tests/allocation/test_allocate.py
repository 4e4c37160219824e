"""Ranks for a budget: energies against autograd, PyWavelets and NumPy; totals against the adapters that are made."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tests.forked_python import run_python
from tests.references import Conv1DModel, Mlp, synthesis_matrix, transform
from wara_peft import WaRAConfig, allocate_ranks, save_as_lora
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.inspection.saved_adapter import inspect_adapter

PLAIN_LORA = {"aa0": 1, "aa1": 0, "ad1": 0, "da1": 0, "dd1": 0}


def model_of(width: int = 12, hidden: int = 20) -> Mlp:
    torch.manual_seed(0)
    return Mlp(width, hidden)


def batches(count: int = 3, width: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(5, 4, width, generator=generator), torch.randint(3, (5, 4), generator=generator))
        for _ in range(count)
    ]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def config_of(**fields) -> WaRAConfig:
    return WaRAConfig(**{"target_modules": ["up", "down"], "r": 2, **fields})


def dense_gradients(model: nn.Module, data) -> dict[str, np.ndarray]:
    """The mean gradients of the weights by autograd, in float64."""
    model = copy.deepcopy(model).double()
    for x, labels in data:
        (loss_fn(model, (x.double(), labels)) / len(data)).backward()
    return {name: getattr(model, name).weight.grad.numpy() for name in ("up", "down")}


def state_of(model: nn.Module) -> list:
    """All that must be as it was."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    parameters = [(p.requires_grad, p.grad is None, p.detach().clone().tolist()) for p in model.parameters()]
    return [hooks, modes, parameters]


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.filterwarnings("ignore:levels=")
def test_energies_and_ranks_from_the_gradient(wavelet, levels):
    model, data = model_of(), batches()
    config = config_of(wavelet=wavelet, levels=levels)
    before = state_of(model.train())
    found = allocate_ranks(model, config, data, budget=300, loss_fn=loss_fn, max_bytes=4 * 12 * 20)  # two groups
    assert state_of(model) == before

    units = []
    for module in found.report.modules:
        gradient = dense_gradients(model, data)[module.name]
        for band, block in transform(gradient, wavelet, levels).items():
            singular = np.linalg.svd(block)[1]
            assert module.energy[band] == pytest.approx((singular**2).sum(), rel=1e-4)
            units += [(value**2 / sum(block.shape), module.name, band, sum(block.shape)) for value in singular]
    left = 300
    expected: dict[tuple[str, str], int] = {}
    for _, name, band, price in sorted(units, reverse=True):
        if price <= left:
            left -= price
            expected[name, band] = expected.get((name, band), 0) + 1
    ranks = {
        (module.name, band): rank for module in found.report.modules for band, rank in module.ranks.items() if rank
    }
    assert ranks == expected
    assert found.report.parameters == 300 - left
    for name, band in expected:
        assert found.config.ranks_of(name)[band] == expected[name, band]


def test_odd_lengths_are_measured_by_the_adjoint():
    model, data = model_of(11, 19), batches(width=11)
    found = allocate_ranks(model, config_of(wavelet="db2"), data, budget=200, loss_fn=loss_fn)
    for module in found.report.modules:
        gradient = dense_gradients(model, data)[module.name]
        for band, energy in module.energy.items():
            left, right = (
                synthesis_matrix("db2", n, 1, letter) for n, letter in zip(gradient.shape, band[:2], strict=True)
            )
            assert energy == pytest.approx(((left.T @ gradient @ right) ** 2).sum(), rel=1e-4)


def test_the_variance_of_the_inputs_is_shared_out_within_a_module():
    model, data = model_of(), [(x + 3, labels) for x, labels in batches()]
    found = allocate_ranks(model, config_of(), data, budget=200, loss_fn=loss_fn, score="activation")
    x = torch.cat([x for x, _ in data]).flatten(0, 1).double().numpy()
    covariance = np.cov(x.T, bias=True)
    up = found.report.modules[0]
    variances = {
        letter: np.linalg.eigvalsh(s.T @ covariance @ s)[::-1]
        for letter in "ad"
        for s in [synthesis_matrix("haar", 12, 1, letter)]
    }
    total = 2 * sum(values.sum() for values in variances.values())
    for band, energy in up.energy.items():
        assert energy == pytest.approx(variances[band[1]].sum() / total, rel=1e-4)
    assert [sum(module.energy.values()) for module in found.report.modules] == pytest.approx([1.0, 1.0])
    assert 200 - 16 < found.report.parameters <= 200


@pytest.mark.parametrize("budget", [16, 100, 333, 700])
def test_the_budget_is_that_of_the_saved_adapter_and_is_spent(budget, tmp_path):
    model = model_of()
    config, report = allocate_ranks(model, config_of(), batches(), budget=budget, loss_fn=loss_fn)
    adapted = get_peft_model(copy.deepcopy(model), config)
    adapted.save_pretrained(tmp_path)
    saved = sum(value.numel() for value in load_file(tmp_path / "adapter_model.safetensors").values())
    assert saved == report.parameters == adapted.get_nb_trainable_parameters()[0]
    assert budget - 16 < saved <= budget  # a pair of any subband has 6 + 10 parameters


@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"up": 3}}, {"target_modules": ["up"]}])
def test_as_many_parameters_as_a_lora(fields):
    like = LoraConfig(r=4, **fields)
    report = allocate_ranks(model_of(), config_of(), batches(), like=like, loss_fn=loss_fn).report
    lora = get_peft_model(model_of(), LoraConfig(**{"r": 4, "target_modules": ["up", "down"], **fields}))
    assert report.budget == lora.get_nb_trainable_parameters()[0]


def test_without_a_budget_it_is_that_of_the_config():
    report = allocate_ranks(model_of(), config_of(), batches(), loss_fn=loss_fn).report
    assert report.budget == get_peft_model(model_of(), config_of()).get_nb_trainable_parameters()[0]
    assert report.parameters == report.budget


def test_plain_lora_over_modules():
    model, data = model_of(), batches()
    config, report = allocate_ranks(
        model, config_of(subband_ranks=PLAIN_LORA), data, budget=6 * 32, loss_fn=loss_fn, min_rank={"down": 1}
    )
    singular = [(s, name) for name, g in dense_gradients(model, data).items() for s in np.linalg.svd(g)[1]]
    chosen = [name for _, name in sorted(singular, reverse=True)[:6]]
    assert {module.name: module.ranks for module in report.modules} == {
        name: {"aa0": chosen.count(name)} for name in ("up", "down")
    }
    assert config.ranks_of("up") == {**PLAIN_LORA, "aa0": chosen.count("up")}


def test_floors_and_caps():
    found = allocate_ranks(
        model_of(),
        config_of(),
        batches(),
        budget=16 * 12,
        loss_fn=loss_fn,
        min_rank={"down": {"dd1": 2}},
        max_rank={"up": 1, ".*": {"aa1": 3}},
    )
    up, down = (module.ranks for module in found.report.modules)
    assert max(up.values()) <= 1
    assert down["dd1"] >= 2
    assert down["aa1"] <= 3
    capped = allocate_ranks(model_of(), config_of(), batches(), budget=10**6, loss_fn=loss_fn, max_rank=2).report
    assert {rank for module in capped.modules for rank in module.ranks.values()} == {2}


@pytest.mark.parametrize(
    "fields", [{}, {"wara_alpha": 6}, {"use_rslora": True}, {"wara_alpha": 6, "use_rslora": True}]
)
def test_the_scaling_stays_that_of_the_uniform_config(fields):
    uniform = get_peft_model(model_of(), config_of(**fields)).base_model.model
    config = allocate_ranks(model_of(), config_of(**fields), batches(), budget=150, loss_fn=loss_fn).config
    adapted = get_peft_model(model_of(), config).base_model.model
    names = [name for name in ("up", "down") if hasattr(getattr(adapted, name), "scaling")]
    assert any(getattr(adapted, n).total_rank("default") != getattr(uniform, n).total_rank("default") for n in names)
    for name in names:
        expected = getattr(uniform, name).scaling["default"]
        assert getattr(adapted, name).scaling["default"] == pytest.approx(expected)


class Nested(nn.Module):
    """Two modules whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 12)
        self.inner = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + 1e-4 * self.up(x))


def test_modules_without_rank_get_no_adapter_also_where_names_end_alike():
    for kept, left in (("up", "inner.up"), ("inner.up", "up")):
        caps = {f"^{left}": 0}
        model = Nested()
        config = WaRAConfig(target_modules=["up"])
        config, _ = allocate_ranks(model, config, batches(), budget=100, loss_fn=loss_fn, max_rank=caps)
        adapted = get_peft_model(model, config)
        assert {name for name, module in model.named_modules() if hasattr(module, "wara_A")} == {kept}
        assert adapted.get_nb_trainable_parameters()[0] <= 100


def test_the_config_saves_loads_merges_and_exports(tmp_path):
    config = allocate_ranks(model_of(), config_of(wara_alpha=5), batches(), budget=170, loss_fn=loss_fn).config
    model = get_peft_model(model_of(), config)
    for name, parameter in model.named_parameters():
        if "wara_B" in name:
            nn.init.normal_(parameter)
    x = batches()[0][0]
    expected = model(x)
    assert not torch.allclose(expected, model_of()(x), atol=1e-2)
    model.save_pretrained(tmp_path / "wara")
    save_as_lora(tmp_path / "lora", tmp_path / "wara")
    for directory in ("wara", "lora"):
        torch.testing.assert_close(PeftModel.from_pretrained(model_of(), tmp_path / directory)(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
    saved = inspect_adapter(SavedAdapter(tmp_path / "wara"))
    assert sum(module.parameters for module in saved.modules) <= 170


def test_a_transformer_with_its_own_loss_and_equal_results_at_any_group_size():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)).train()
    ids = torch.randint(1, 50, (4, 6))
    data = [{"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0]), "attention_mask": torch.ones(4, 6)}]
    config = WaRAConfig(target_modules="all-linear", task_type="SEQ_CLS")
    whole = allocate_ranks(model, config, data, budget=2000)
    assert "classifier" not in {module.name for module in whole.report.modules}
    assert len(whole.report.modules) == 13  # six in each layer, and the pooler
    for score in ("gradient", "activation"):
        first = allocate_ranks(model, config, data, budget=2000, score=score)
        grouped = allocate_ranks(model, config, data, budget=2000, score=score, max_bytes=8 * 25**2)
        assert first.config == grouped.config
    assert model.training
    adapted = get_peft_model(copy.deepcopy(model), whole.config)
    assert adapted.get_nb_trainable_parameters()[0] - sum(
        p.numel() for name, p in adapted.named_parameters() if p.requires_grad and "classifier" in name
    ) == (whole.report.parameters)


def squares(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
    return model(batch[0]).square().float().sum()


def test_quantized_weights_and_no_trace_of_how_they_are_packed():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    model = nn.Sequential(layer.to("cpu"))
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone()
    x = torch.randn(6, 64)
    (module,) = allocate_ranks(
        model, WaRAConfig(target_modules=["0"]), [(x,)], budget=200, loss_fn=squares
    ).report.modules
    gradient = (2 * (x @ weight.T + layer.bias)).T @ x
    assert sum(module.energy.values()) == pytest.approx(float(gradient.square().sum()), rel=1e-2)
    after = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(after, weight)


def test_transposed_weights_and_half_precision():
    model = Conv1DModel().bfloat16()
    x = torch.randn(5, 9).bfloat16()
    config = WaRAConfig(target_modules=["proj"])
    data = [(x,)]
    (module,) = allocate_ranks(model, config, data, budget=50, loss_fn=squares).report.modules
    gradient = (2 * model(x).float()).T @ x.float()  # (14, 9)
    assert module.out_features == 14
    bands = {n: [synthesis_matrix("haar", n, 1, letter) for letter in "ad"] for n in (14, 9)}
    dense = gradient.double().detach().numpy()
    energy = sum(((left.T @ dense @ right) ** 2).sum() for left in bands[14] for right in bands[9])
    assert sum(module.energy.values()) == pytest.approx(energy, rel=2e-2)


def test_a_layer_after_which_things_change_in_place():
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    config = WaRAConfig(target_modules=["0", "2"])
    report = allocate_ranks(model, config, batches(), budget=100, loss_fn=loss_fn).report
    reference = copy.deepcopy(model)
    for batch in batches():
        (loss_fn(reference, batch) / 3).backward()
    for module, layer in zip(report.modules, (reference[0], reference[2]), strict=True):
        if layer.weight.shape[0] % 2 == 0:
            assert sum(module.energy.values()) == pytest.approx(float(layer.weight.grad.square().sum()), rel=1e-4)


def test_an_input_that_is_changed_in_place_after_use_is_no_silent_error():
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            result = self.up(x)
            x.mul_(2)
            return result

    with pytest.raises(RuntimeError, match="input of module 'up' is changed in place"):
        allocate_ranks(Changes(), WaRAConfig(target_modules=["up"]), batches(), budget=50, loss_fn=loss_fn)


def test_the_report(tmp_path):
    report = allocate_ranks(model_of(), config_of(), batches(), budget=200, loss_fn=loss_fn).report
    assert json.loads(json.dumps(report.as_dict()))["parameters"] == report.parameters
    assert sum(sum(row.values()) for row in report.energy_shares().values()) == pytest.approx(1.0)
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "out", "x", "in", "aa1", "ad1", "da1", "dd1", "parameters"]
    up = report.modules[0]
    assert lines[1].split()[:4] == ["up", "20", "x", "12"]
    assert f"{up.ranks['aa1']} ({report.energy_shares()['up']['aa1']:.1%})" in lines[1]
    assert lines[-1].startswith(f"{report.parameters:,} of 200 parameters")
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class Unused(Mlp):
    """Its `down` has no part in the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.pad(self.up(x), (0, 0))[..., :12])


def failing(model: nn.Module, batch) -> torch.Tensor:
    loss_fn(model, batch)
    raise OSError("no more data")


NAN = [(torch.full((2, 2, 12), torch.nan), torch.zeros(2, 2, dtype=torch.long))]
BAD_INPUTS = {
    "budget below one pair": ({"budget": 15}, ValueError, "budget=15 is less than one pair, the cheapest .* 16"),
    "budget below the floors": ({"budget": 100, "min_rank": 1}, ValueError, "alone cost 128, more than the budget"),
    "budget and like": ({"like": LoraConfig()}, ValueError, "`budget` or `like`, not both"),
    "zero gradients": ({"loss_fn": lambda m, b: 0 * loss_fn(m, b)}, ValueError, "All gradients are zero"),
    "gradients that are not finite": ({"dataloader": NAN}, ValueError, "The gradient of module '.*' is not finite"),
    "inputs that are not finite": ({"dataloader": NAN, "score": "activation"}, ValueError, "'up' is not finite"),
    "a loss that is no scalar": ({"loss_fn": lambda m, b: m(b[0])}, ValueError, r"scalar.*shape \(5, 4, 3\)"),
    "a loss that is no tensor": ({"loss_fn": lambda m, b: 1.0}, ValueError, "scalar tensor, and is of float"),
    "no loss": ({"loss_fn": None, "dataloader": [torch.zeros(2, 12)]}, ValueError, "returns no loss"),
    "no batches": ({"dataloader": []}, ValueError, "gives no batches"),
    "a loss that fails": ({"loss_fn": failing}, OSError, "no more data"),
    "an unreached target": ({"model": Unused()}, ValueError, "never reaches module 'down'"),
    "an unreached target's inputs": ({"model": Unused(), "score": "activation"}, ValueError, "reaches module 'down'"),
    "grid": ({"config": config_of(form="grid")}, ValueError, "not for form='grid', whose parameters"),
    "tiny": ({"config": config_of(form="tiny")}, ValueError, "not for form='tiny', whose parameters"),
    "shared": ({"config": config_of(form="shared")}, ValueError, "not for form='shared', whose parameters"),
    "aa0 beside subbands": ({"config": config_of(subband_ranks={"aa0": 1})}, ValueError, "ranks for 'aa0'.*'up'|'up'"),
    "no such score": ({"score": "magic"}, ValueError, "score='magic' is not one of"),
    "no batches wanted": ({"batches": 0}, ValueError, "batches=0 must be an int of at least 1"),
    "little memory": ({"max_bytes": 900}, ValueError, "max_bytes=900 is less than module 'up' needs by itself, 960"),
    "a floor above the size": ({"min_rank": 7}, ValueError, "min_rank=7 of subband 'aa1' in module 'up'.*6"),
    "a rank that is none": ({"max_rank": {"up": "x"}}, TypeError, "max_rank='x' for module 'up'"),
    "no rank at all": ({"max_rank": 0}, ValueError, "max_rank leaves no subband a rank"),
    "no such target": ({"config": config_of(target_modules=["q"])}, ValueError, "names no module"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_changes_nothing(case):
    fields, error, message = BAD_INPUTS[case]
    arguments = {"config": config_of(), "dataloader": batches(), "budget": 100, "loss_fn": loss_fn, **fields}
    model = arguments.pop("model", model_of()).train()
    model.up.weight.requires_grad_(False)
    before = state_of(model)
    with pytest.raises(error, match=message):
        allocate_ranks(model, arguments.pop("config"), arguments.pop("dataloader"), **arguments)
    assert str(state_of(model)) == str(before)


def test_other_layers_and_adapted_models_are_refused():
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3)})
    with pytest.raises(TypeError, match=r"conv \(Conv1d\) is none"):
        allocate_ranks(model, WaRAConfig(target_modules=["conv"]), batches(), budget=100)
    with pytest.raises(ValueError, match="has adapters already"):
        allocate_ranks(get_peft_model(model_of(), config_of()), config_of(), batches(), budget=100)


RUN = """
import json, sys
import torch.distributed as dist
from tests.allocation.test_allocate import *
dist.init_process_group("gloo")
rank = dist.get_rank()
for score in ("gradient", "activation"):
    found = allocate_ranks(model_of(), config_of(), batches(4)[rank::2], budget=300, loss_fn=loss_fn, score=score)
    with open(f"{sys.argv[1]}/{score}{rank}.json", "w") as file:
        json.dump(found.report.as_dict(), file)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    result = run_python("-c", RUN, tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    for score in ("gradient", "activation"):
        one, other = (json.loads((tmp_path / f"{score}{rank}.json").read_text()) for rank in (0, 1))
        assert one == other
        single = allocate_ranks(model_of(), config_of(), batches(4), budget=300, loss_fn=loss_fn, score=score).report
        assert [module["ranks"] for module in one["modules"]] == [module.ranks for module in single.modules]
        for module, expected in zip(one["modules"], single.modules, strict=True):
            assert module["energy"] == pytest.approx(expected.energy, rel=1e-4)
