"""Combination types of LoRA: those that PEFT makes of the exported LoRAs, with the same random masks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.cases import CASES as ALL
from tests.models import TOKENS, Everything, X, mlp
from tests.references import Mlp
from wara_peft import WaRAConfig, to_lora
from wara_peft.layers.base import WaRALayer

TYPES = {
    "svd": {"svd_rank": 5, "svd_clamp": 0.9},
    "ties": {"density": 0.4},
    "ties_svd": {"density": 0.4, "svd_rank": 6, "majority_sign_method": "frequency"},
    "dare_linear": {"density": 0.6},
    "dare_linear_svd": {"density": 0.6, "svd_rank": 2, "svd_full_matrices": False},
    "dare_ties": {"density": 0.6},
    "dare_ties_svd": {"density": 0.6, "svd_rank": 3},
    "magnitude_prune": {"density": 0.3},
    "magnitude_prune_svd": {"density": 0.3, "svd_rank": 4},
}
WEIGHTS = [0.7, -1.5, 2.0]
pytestmark = [
    pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA:UserWarning"),
    pytest.mark.filterwarnings("ignore:levels=. is more than is useful:UserWarning"),
]


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 10, (3, 2))
        self.flat = nn.Conv2d(10, 8, 1)
        self.linear = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.flat(torch.tanh(self.conv(x))).mean((2, 3)))


# model, an input, targets of the three adapters, whose ranks differ by module, but not the largest
CASES = {
    "linear": (mlp, X, [["up"], ["up", "down"], ["down"]]),
    "conv1d": (ALL["Conv1D, subband"].base, torch.randn(4, 9), [["layer"]] * 3),
    "conv2d": (Pictures, torch.randn(4, 6, 5, 5), [["conv", "flat"], ["linear", "conv"], ["flat", "linear"]]),
    "embedding": (Everything, TOKENS, [["embedding"], ["embedding", "linear"], ["linear"]]),
}


def adapted(case: str) -> tuple[nn.Module, PeftModel, list[str]]:
    make, _, targets = CASES[case]
    base = make()
    names = ["default", "second", "third"]
    configs = [
        WaRAConfig(target_modules=targets[0], init_weights=False, wara_alpha=30),
        WaRAConfig(target_modules=targets[1], init_weights=False, wavelet="db2", r=4),
        WaRAConfig(target_modules=targets[2], init_weights=False, form="shared", r=8, wara_alpha=5),
    ]
    model = get_peft_model(copy.deepcopy(base), configs[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    return base, model.eval(), names


def as_lora(base: nn.Module, model: PeftModel, names: list[str]) -> PeftModel:
    """A model of PEFT's LoRA with the exported adapters."""
    loras = {name: to_lora(model, adapter_name=name) for name in names}
    lora = get_peft_model(copy.deepcopy(base), loras[names[0]][0], adapter_name=names[0])
    for name in names[1:]:
        lora.add_adapter(name, loras[name][0])
    for name, (_, tensors) in loras.items():
        set_peft_model_state_dict(lora, tensors, adapter_name=name)
    return lora.eval()


class Masks:
    """Takes the place of `torch.bernoulli`, so that DARE's masks depend on the call and the place in a tensor only.

    PEFT draws other random numbers before them, and for tensors of other strides in another order.
    """

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __call__(self, shares: torch.Tensor) -> torch.Tensor:
        return (torch.rand(shares.shape, generator=self.generator, dtype=torch.float64) < shares).to(shares.dtype)


@pytest.mark.parametrize("combination_type", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_peft_makes_of_the_exported_loras(case, combination_type, tmp_path, monkeypatch):
    base, model, names = adapted(case)
    lora = as_lora(base, model, names)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for each in (lora, model):
        monkeypatch.setattr(torch, "bernoulli", Masks())
        each.add_weighted_adapter(names, WEIGHTS, "new", combination_type, **TYPES[combination_type])

    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    theirs = {name: layer for name, layer in lora.named_modules() if isinstance(layer, LoraLayer)}
    ours = {name: layer for name, layer in model.named_modules() if isinstance(layer, WaRALayer)}
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        expected = theirs[name].get_delta_weight("new")
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(layer.get_delta_weight("new"), expected, atol=1e-5, rtol=1e-5)
        assert layer.factors("new")[0].subbands == ("aa0",)
        assert layer.total_rank("new") == lora.peft_config["new"].r

    x = CASES[case][1]
    assert model.active_adapter == "default"
    model.set_adapter("new")
    lora.set_adapter("new")
    model.requires_grad_(False)  # as what is loaded is, or products take other kernels
    torch.testing.assert_close(model(x), lora(x), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new").eval()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("case", CASES)
def test_the_default_is_loras(case):
    """The best approximation that has the largest rank of the adapters, so that an engine that takes one takes it."""
    base, model, names = adapted(case)
    lora = as_lora(base, model, names)
    # Ranks are larger than sides here. PEFT's SVD of convolutions then stops with an error of shapes.
    kind, options = ("cat", {}) if case == "conv2d" else ("svd", {"svd_full_matrices": False})
    lora.add_weighted_adapter(names, WEIGHTS, "new", kind, **options)
    model.add_weighted_adapter(names, WEIGHTS, "new")
    largest = max(lora.peft_config[name].r for name in names)
    theirs = {name: layer for name, layer in lora.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in model.named_modules():
        if isinstance(layer, WaRALayer):
            assert layer.total_rank("new") <= largest
            expected = theirs[name].get_delta_weight("new")
            torch.testing.assert_close(layer.get_delta_weight("new"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("combination_type", ["cat", "linear", *TYPES])
def test_one_adapter_is_scaled_exactly_whatever_the_type(combination_type):
    _, model, _ = adapted("linear")
    model.add_weighted_adapter(["second"], [-0.5], "halved", combination_type)
    for layer in model.modules():
        if isinstance(layer, WaRALayer) and "second" in layer.wara_A:
            torch.testing.assert_close(layer.get_delta_weight("halved"), -0.5 * layer.get_delta_weight("second"))
            assert layer.total_rank("halved") == layer.total_rank("second")
            assert layer.factors("halved")[0].subbands == layer.factors("second")[0].subbands


def test_random_numbers_beside_those_of_peft_are_not_drawn():
    _, model, names = adapted("linear")
    torch.manual_seed(3)
    model.add_weighted_adapter(names, WEIGHTS, "first", "dare_ties", density=0.5)
    torch.manual_seed(3)
    model.add_weighted_adapter(names, WEIGHTS, "second time", "dare_ties", density=0.5)
    torch.manual_seed(4)
    model.add_weighted_adapter(names, WEIGHTS, "another", "dare_ties", density=0.5)
    layer = model.base_model.model.up
    assert torch.equal(layer.get_delta_weight("first"), layer.get_delta_weight("second time"))
    assert not torch.equal(layer.get_delta_weight("first"), layer.get_delta_weight("another"))


def test_tiny_and_trained_biases():
    base = mlp()
    config = WaRAConfig(target_modules=["up"], form="tiny", r=2, init_weights=False, bias="wara_only")
    model = get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("other", WaRAConfig(target_modules=["up"], r=2, init_weights=False))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "base_model.model.up.base_layer.bias" in trained
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new", "svd", svd_rank=50)
    layer = model.base_model.model.up
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert layer.total_rank("new") == min(expected.shape)
    torch.testing.assert_close(layer.get_delta_weight("new"), expected, atol=1e-5, rtol=1e-5)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


CONVOLUTIONS = {
    "one axis": lambda: nn.Conv1d(6, 10, 3),
    "three axes": lambda: nn.Conv3d(6, 10, (2, 1, 2)),
    "groups": lambda: nn.Conv2d(6, 10, 2, groups=2),
}


@pytest.mark.parametrize("combination_type", [name for name in TYPES if name.endswith("svd")])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_that_peft_does_not_take_combine_as_linear_layers_do(case, combination_type, monkeypatch):
    """ΔW as a matrix of out channels and the rest is that of a linear layer; PEFT gets a LoRA of these."""
    model = get_peft_model(
        nn.ModuleDict({"layer": CONVOLUTIONS[case]().double()}),
        WaRAConfig(target_modules=["layer"], init_weights=False, wara_alpha=30),
    )
    model.add_adapter("other", WaRAConfig(target_modules=["layer"], init_weights=False, r=2, wavelet="db2"))
    layer, names = model.base_model.model.layer, ["default", "other"]
    deltas = {name: layer.get_delta_weight(name).detach().flatten(1) for name in names}
    rows, columns = deltas["default"].shape
    lora = get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(columns, rows).double()}),
        LoraConfig(target_modules=["layer"], r=columns, lora_alpha=columns),
    )
    lora.add_adapter("other", lora.peft_config["default"])
    for name, delta in deltas.items():
        lora.base_model.model.layer.lora_A[name].weight.data.copy_(torch.eye(columns))
        lora.base_model.model.layer.lora_B[name].weight.data.copy_(delta)
    for each in (lora, model):
        monkeypatch.setattr(torch, "bernoulli", Masks())
        each.add_weighted_adapter(names, [0.75, -1.5], "new", combination_type, **TYPES[combination_type])
    expected = lora.base_model.model.layer.get_delta_weight("new")
    assert expected.norm() > 0.1
    torch.testing.assert_close(layer.get_delta_weight("new").flatten(1), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
def test_the_default_takes_any_dtype_and_keeps_its_digits(dtype, tolerance):
    """PyTorch has no SVD in bfloat16, and PEFT rounds weights to float32. The rank is larger than the sides here."""
    config = WaRAConfig(target_modules=["up"], init_weights=False)
    model = get_peft_model(Mlp().to(dtype), config, autocast_adapter_dtype=False)
    model.add_adapter("other", WaRAConfig(target_modules=["up"], init_weights=False, wavelet="db2"))
    model.to(dtype).add_weighted_adapter(["default", "other"], [0.1, -1.3], "new")
    layer = model.base_model.model.up
    found, first, second = (layer.get_delta_weight(name).double() for name in ("new", "default", "other"))
    expected = 0.1 * first - 1.3 * second
    assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(
    ("case", "combination_type", "options", "message"),
    [
        (
            "ranks",
            "ties",
            {"density": 0.5},
            "'ties' needs adapters of one rank R, but 'default' has 16, 'other' has 4",
        ),
        ("ranks", "dare_linear", {}, "'dare_linear' needs `density`, the share of values that it keeps"),
        ("ranks", "dare_ties_svd", {"density": 0}, "density=0 is the share of values to keep: more than 0"),
        (
            "ranks",
            "ties_svd",
            {"density": 1.5},
            "density=1.5 is the share of values to keep: more than 0",
        ),
        (
            "groups",
            "ties",
            {"density": 0.5},
            r"'ties' does not take convolutions with groups, .* such as 'conv' \(Conv2d\). Use 'ties_svd', or 'cat'",
        ),
    ],
)
def test_what_it_refuses(case, combination_type, options, message):
    base = {
        "ranks": nn.ModuleDict({"conv": nn.Linear(8, 8)}),
        "groups": nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, groups=2)}),
    }[case]
    model = get_peft_model(base, WaRAConfig(target_modules=["conv"], init_weights=False))
    model.add_adapter("other", WaRAConfig(target_modules=["conv"], r=1, init_weights=False))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new", combination_type, **options)
    assert set(model.state_dict()) == before and list(model.peft_config) == ["default", "other"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new", "cat")
