"""Saved adapters of WaRA and LoRA, combined without a base model, against PEFT's `add_weighted_adapter` in a model."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.injection.test_peft_combinations import Masks
from tests.models import Attention, llama, low_rank, mixture, mlp
from wara_peft import WaRAConfig, to_lora
from wara_peft.disk.adapters.lora_modules import SavedLoraModules
from wara_peft.disk.checkpoints.tensors import TensorFile
from wara_peft.injection.combine import COMBINATION_TYPES
from wara_peft.lora.combine_saved import combine_adapters

pytestmark = pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA:UserWarning")
DENSITIES = {name: 0.6 for name in COMBINATION_TYPES if name not in ("cat", "linear", "svd")}
WEIGHTS = [0.7, -1.5, 2.0]


class Pieces(nn.Module):
    """Layers of several kinds, whose order in the model is that of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.a_up = nn.Linear(12, 20)
        self.b_down = nn.Linear(20, 9)
        self.c_turned = Conv1D(14, 10)
        self.d_conv = nn.Conv2d(6, 10, (3, 2))
        self.e_flat = nn.Conv2d(10, 8, 1)
        self.f_embedding = nn.Embedding(18, 11)
        self.g_series = nn.Conv1d(6, 10, 3)


def pieces() -> nn.Module:
    torch.manual_seed(0)
    return Pieces().double()


def save(path: Path, base: nn.Module, config: PeftConfig, dtype: torch.dtype = torch.float64) -> Path:
    """Save an adapter with random values in all of its factors, and nothing else of the model."""
    torch.manual_seed(sum(map(ord, path.name)))
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "wara_" in name:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path, save_embedding_layers=False)
    return path


# By case: targets, and whether the layers keep weights as (in, out). All three adapters have the LoRA rank 16.
CASES = {
    "linear": (["a_up", "b_down"], False),
    "turned": (["c_turned"], True),
    "convolutions": (["d_conv", "e_flat"], False),
    "embedding": (["f_embedding", "b_down"], False),
}


def three(path: Path, case: str) -> list[Path]:
    """A WaRA, a LoRA and another WaRA adapter, each on other modules."""
    targets, turned = CASES[case]
    configs: Mapping[str, PeftConfig] = {
        "wavelets": WaRAConfig(target_modules=targets[:1], wara_alpha=30, wavelet="db2", r=4),
        "lora": LoraConfig(
            target_modules=targets,
            r=16,
            lora_alpha=5,
            use_rslora=True,
            fan_in_fan_out=turned,
            alpha_pattern={"b_down": 3},
        ),
        "shared": WaRAConfig(target_modules=targets[-1:], form="shared", r=8, wara_alpha=9),
    }
    return [save(path / name, pieces(), config) for name, config in configs.items()]


def as_lora(paths: Sequence[Path], base: nn.Module) -> PeftModel:
    """A model of PEFT's LoRA with the adapters of these directories, named by number, in float64."""
    model: Any = None
    for number, path in enumerate(paths):
        is_lora = json.loads((path / "adapter_config.json").read_text())["peft_type"] == "LORA"
        config, tensors = (
            (LoraConfig.from_pretrained(path), load_file(path / "adapter_model.safetensors"))
            if is_lora
            else to_lora(path, dtype=torch.float64)
        )
        if model is None:
            model = get_peft_model(copy.deepcopy(base), config, str(number), autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(number), config, autocast_adapter_dtype=False)
        found = set_peft_model_state_dict(model, tensors, str(number))
        assert not found.unexpected_keys
    return model.double()


def deltas(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and (adapter in layer.lora_A or adapter in layer.lora_embedding_A)
    }


def loaded(path: Path, base: nn.Module) -> PeftModel:
    """The result, as PEFT loads it without this package's help: its config is LoRA's, and no key is missing."""
    config = LoraConfig.from_pretrained(path)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    keys = {key for key, _ in model.named_parameters() if "lora_" in key}
    tensors = load_file(path / "adapter_model.safetensors")
    assert {key.replace(".default", "") for key in keys} == tensors.keys()
    set_peft_model_state_dict(model, tensors)
    return model


@contextmanager
def float64_weights() -> Iterator[None]:
    """PEFT makes tensors of weights, and so rounds them, in PyTorch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 1e-2
        assert (found[name].double() - value).norm() <= tolerance * value.norm(), name


def no_reading(*_: object) -> None:
    raise AssertionError("tensors are read before the refusal")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
def test_it_is_what_peft_makes_in_a_model(tmp_path, monkeypatch, combination_type, case):
    paths, density = three(tmp_path, case), DENSITIES.get(combination_type)
    rank = 5 if combination_type.endswith("svd") else None
    theirs = as_lora(paths, pieces())
    with float64_weights(), torch.no_grad():
        monkeypatch.setattr(torch, "bernoulli", Masks())
        theirs.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "new", combination_type, density=density, svd_rank=rank)
    monkeypatch.setattr(torch, "bernoulli", Masks())
    made = combine_adapters(paths, WEIGHTS, tmp_path / "out", combination_type, density=density, svd_rank=rank)
    ours = loaded(tmp_path / "out", pieces())
    close(deltas(ours, "default"), deltas(theirs, "new"))
    assert made.config.r == ours.peft_config["default"].r <= theirs.peft_config["new"].r
    # one layer of three adapters, or layers of two
    assert made.config.r == (rank or 16 if combination_type != "cat" else 48 if case == "turned" else 32)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_weighted_sum_and_its_best_approximation(tmp_path, case):
    """Against each adapter's own ΔW in a model that holds it: WaRA's as WaRA, and LoRA's as LoRA."""
    paths = three(tmp_path, case)
    expected: dict[str, Tensor] = {}
    for path, weight in zip(paths, WEIGHTS, strict=True):
        model = PeftModel.from_pretrained(pieces(), path, autocast_adapter_dtype=False)
        for name, layer in model.named_modules():
            if hasattr(layer, "get_delta_weight") and name.count(".") == 2:
                key = name.removeprefix("base_model.model.")
                expected[key] = expected.get(key, 0) + weight * layer.get_delta_weight("default").detach()
    made = combine_adapters(paths, WEIGHTS, tmp_path / "cat", "cat")
    close(deltas(loaded(tmp_path / "cat", pieces()), "default"), expected, 1e-13)
    assert (made.error, made.rounded) == (0.0, False)

    made = combine_adapters(paths, WEIGHTS, tmp_path / "svd", svd_rank=3)
    found = deltas(loaded(tmp_path / "svd", pieces()), "default")
    lost = whole = 0.0
    for name, value in expected.items():
        flat = value.flatten(1)
        u, values, vh = torch.linalg.svd(flat, full_matrices=False)
        close({name: found[name].flatten(1)}, {name: (u[:, :3] * values[:3]) @ vh[:3]})
        lost, whole = lost + float((values[3:] ** 2).sum()), whole + float((values**2).sum())
    assert made.error == pytest.approx(math.sqrt(lost / whole), rel=1e-10) and made.error > 0.1


def test_linear_is_the_product_of_the_sums_of_factors(tmp_path):
    paths = three(tmp_path, "linear")
    combine_adapters(paths, WEIGHTS, tmp_path / "out", "linear")
    (_, first), lora, (_, third) = (
        to_lora(paths[0]),
        load_file(paths[1] / "adapter_model.safetensors"),
        to_lora(paths[2]),
    )
    # a_up has the scaling 5 / √16, and b_down, by its alpha, 3 / √16
    places = {"a_up": [(first, 0.7), (lora, -1.5 * 5 / 4)], "b_down": [(lora, -1.5 * 3 / 4), (third, 2.0)]}
    expected = {}
    for name, pairs in places.items():
        keys = [f"base_model.model.{name}.lora_{side}.weight" for side in "AB"]
        sum_a = sum(math.copysign(math.sqrt(abs(weight)), weight) * tensors[keys[0]] for tensors, weight in pairs)
        sum_b = sum(math.sqrt(abs(weight)) * tensors[keys[1]] for tensors, weight in pairs)
        expected[name] = sum_b @ sum_a
    close(deltas(loaded(tmp_path / "out", pieces()), "default"), expected, 1e-13)


@pytest.mark.parametrize("combination_type", ["cat", "svd", "ties_svd", "linear", "magnitude_prune"])
def test_ranks_by_module(tmp_path, combination_type):
    """PEFT writes a config that does not fit such a combination, so it is compared in the model."""
    first = LoraConfig(target_modules=["a_up", "b_down"], r=6, rank_pattern={"a_up": 2}, alpha_pattern={"a_up": 5})
    second = LoraConfig(target_modules="(a|b)_.*", r=6, rank_pattern={"a_up": 2, "b_down": 6}, lora_alpha=3)
    paths = [save(tmp_path / "one", pieces(), first), save(tmp_path / "two", pieces(), second)]
    theirs, density = as_lora(paths, pieces()), DENSITIES.get(combination_type)
    # A mix of names and patterns in target_modules is refused by PEFT.
    theirs.peft_config["0"].target_modules = theirs.peft_config["1"].target_modules
    with float64_weights():
        theirs.add_weighted_adapter(
            ["0", "1"], [0.4, -2], "new", combination_type, density=density, svd_full_matrices=False
        )
    combine_adapters(paths, [0.4, -2], tmp_path / "out", combination_type, density=density)
    close(deltas(loaded(tmp_path / "out", pieces()), "default"), deltas(theirs, "new"))


@pytest.mark.parametrize("combination_type", ["linear", "ties"])
def test_unequal_ranks_in_one_module(tmp_path, combination_type):
    """PEFT stops with an error of shapes. Zeros fill up the smaller factors, as they do in an exported LoRA."""
    small = LoraConfig(target_modules=["a_up", "b_down"], r=4, rank_pattern={"a_up": 2})
    paths = [
        save(tmp_path / "one", pieces(), small),
        save(tmp_path / "two", pieces(), LoraConfig(target_modules=["a_up", "b_down"], r=4)),
    ]
    density = DENSITIES.get(combination_type)
    combine_adapters(paths, [1, 0.5], tmp_path / "out", combination_type, density=density)
    # the same adapter with its zeros and its scaling, 8 / 2, written out
    tensors = load_file(paths[0] / "adapter_model.safetensors")
    for side, dimension in (("A", 0), ("B", 1)):
        key = f"base_model.model.a_up.lora_{side}.weight"
        tensors[key] = torch.cat([tensors[key], torch.zeros_like(tensors[key])], dimension)
    save_file(tensors, paths[0] / "adapter_model.safetensors")
    fields = json.loads((paths[0] / "adapter_config.json").read_text())
    changed = {"rank_pattern": {}, "alpha_pattern": {"a_up": 16}}
    (paths[0] / "adapter_config.json").write_text(json.dumps({**fields, **changed}))
    theirs = as_lora(paths, pieces())
    with float64_weights():
        theirs.add_weighted_adapter(["0", "1"], [1, 0.5], "new", combination_type, density=density)
    close(deltas(loaded(tmp_path / "out", pieces()), "default"), deltas(theirs, "new"))


def test_convolutions_that_peft_does_not_combine(tmp_path):
    """PEFT's SVD takes no Conv1d. Groups share LoRA's rank, which its "cat" mixes up."""

    def grouped() -> nn.Module:
        torch.manual_seed(1)
        return nn.ModuleDict({"grouped": nn.Conv2d(8, 12, 3, groups=2), "series": nn.Conv1d(6, 10, 3)}).double()

    configs = {
        "one": WaRAConfig(target_modules=["grouped", "series"], r=2),
        "two": WaRAConfig(target_modules=["grouped", "series"], r=1, form="shared", wara_alpha=7),
    }
    paths = [save(tmp_path / name, grouped(), config) for name, config in configs.items()]
    models = {path.name: PeftModel.from_pretrained(grouped(), path, autocast_adapter_dtype=False) for path in paths}
    layers = {
        name: {key: model.base_model.model[name].get_delta_weight("default").detach() for key, model in models.items()}
        for name in grouped().keys()  # noqa: SIM118  # no dict
    }
    expected = {name: 0.25 * of["one"] - 3 * of["two"] for name, of in layers.items()}
    for combination_type, rank in (("cat", None), ("svd", 100)):
        out = tmp_path / combination_type
        combine_adapters(paths, [0.25, -3], out, combination_type, svd_rank=rank)
        tensors = load_file(out / "adapter_model.safetensors")
        for name, value in expected.items():
            lora_a, lora_b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            groups = 2 if name == "grouped" else 1
            if groups == 1:
                found = torch.einsum("mr,r...->m...", lora_b.flatten(1), lora_a)
            else:  # LoRA's A sees all channels, and is zero on those of other groups
                halves = zip(lora_b.flatten(1).chunk(2), lora_a.chunk(2), (slice(0, 4), slice(4, 8)), strict=True)
                found = torch.cat([torch.einsum("mr,r...->m...", b, a[:, own]) for b, a, own in halves])
                assert not lora_a.chunk(2)[0][:, 4:].any() and not lora_a.chunk(2)[1][:, :4].any()
            torch.testing.assert_close(found, value, atol=1e-11, rtol=1e-11)
    with pytest.raises(ValueError, match=r"'ties_svd' does not take convolutions with groups, .* such as 'grouped'"):
        combine_adapters(paths, [1, 1], tmp_path / "out", "ties_svd", density=0.5)
    with pytest.raises(ValueError, match=r"svd_rank=3 must be a multiple .* 'grouped' \(2\)"):
        combine_adapters(paths, [1, 1], tmp_path / "out", "svd", svd_rank=3)
    assert not (tmp_path / "out").exists()


def test_what_dare_drops_follows_from_the_seed(tmp_path, monkeypatch):
    paths = three(tmp_path, "turned")
    state = torch.get_rng_state()
    for name, seed in {"first": 0, "again": 0, "other": 1}.items():
        torch.manual_seed(len(name))
        before = torch.get_rng_state()
        combine_adapters(paths, WEIGHTS, tmp_path / name, "dare_linear", density=0.5, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    found = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again", "other")}
    key = "base_model.model.c_turned.lora_A.weight"
    assert torch.equal(found["first"][key], found["again"][key])
    assert not torch.equal(found["first"][key], found["other"][key])

    theirs = as_lora(paths, pieces())
    draw = torch.bernoulli
    seeds = iter([0])

    def seeded(shares: Tensor) -> Tensor:
        """PEFT has drawn the new adapter's first values by now."""
        for seed in seeds:
            torch.manual_seed(seed)
        return draw(shares)

    monkeypatch.setattr(torch, "bernoulli", seeded)
    with float64_weights():
        theirs.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "new", "dare_linear", density=0.5)
    close(deltas(loaded(tmp_path / "first", pieces()), "default"), deltas(theirs, "new"))


@pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
def test_one_adapter_is_scaled_exactly_whatever_the_type(tmp_path, combination_type):
    for path in three(tmp_path, "linear")[:2]:
        out = tmp_path / f"{path.name} halved"
        assert combine_adapters([path], [-0.5], out, combination_type).error == 0
        own = as_lora([path], pieces())
        close(
            deltas(loaded(out, pieces()), "default"), {n: -0.5 * value for n, value in deltas(own, "0").items()}, 1e-13
        )


def test_a_density_of_one_keeps_all_and_warns_of_nothing(tmp_path, recwarn):
    paths = three(tmp_path, "linear")
    recwarn.clear()
    combine_adapters(paths, WEIGHTS, tmp_path / "all", "dare_linear_svd", density=1, svd_rank=9)
    assert not [str(warning.message) for warning in recwarn if "density" in str(warning.message)]
    combine_adapters(paths, WEIGHTS, tmp_path / "sum", "svd", svd_rank=9)
    found, expected = (deltas(loaded(tmp_path / name, pieces()), "default") for name in ("all", "sum"))
    close(found, expected)


def test_dtypes(tmp_path):
    """The sum is rounded once, to the widest dtype of a module's adapters, or to the one that is asked for."""
    half, both = ["a_up"], ["a_up", "b_down"]
    paths = [
        save(tmp_path / "half", pieces(), WaRAConfig(target_modules=both), torch.bfloat16),
        save(tmp_path / "single", pieces(), LoraConfig(target_modules=half), torch.float32),
        save(tmp_path / "other", pieces(), LoraConfig(target_modules=["b_down"]), torch.bfloat16),
    ]
    exact = combine_adapters(paths, WEIGHTS, tmp_path / "exact", "cat", dtype=torch.float64)
    assert not exact.rounded
    expected = load_file(tmp_path / "exact" / "adapter_model.safetensors")
    assert {value.dtype for value in expected.values()} == {torch.float64}
    assert not combine_adapters(paths, WEIGHTS, tmp_path / "own", "cat").rounded
    assert combine_adapters(paths, WEIGHTS, tmp_path / "bf16", "cat", dtype=torch.bfloat16).rounded
    own, narrow = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "bf16"))
    for key, value in expected.items():
        wide = torch.float32 if "a_up" in key else torch.bfloat16
        assert (own[key].dtype, narrow[key].dtype) == (wide, torch.bfloat16)
        for found in (own[key], narrow[key]):
            tolerance = torch.finfo(found.dtype).eps
            torch.testing.assert_close(found.double(), value, atol=1e-7, rtol=tolerance)
    theirs = as_lora(paths, pieces())
    with float64_weights():
        theirs.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "new", "cat")
    close(deltas(loaded(tmp_path / "exact", pieces()), "default"), deltas(theirs, "new"))


def test_a_language_model_computes_with_it(tmp_path):
    """Plain PEFT loads the result, and its logits are those of the base with the sum of ΔW added to its weights."""
    base = llama()
    paths = [
        save(tmp_path / "wara", base, WaRAConfig(target_modules="all-linear", task_type="CAUSAL_LM"), torch.float32),
        save(tmp_path / "lora", base, LoraConfig(target_modules=["q_proj", "up_proj"], r=3), torch.float32),
    ]
    made = combine_adapters(paths, [0.05, -0.1], tmp_path / "out", "cat")
    assert (made.config.task_type, made.config.r) == ("CAUSAL_LM", 19)
    merged = llama()
    for path, weight in zip(paths, (0.05, -0.1), strict=True):
        model = PeftModel.from_pretrained(llama(), path).eval()
        for name, layer in model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                target = merged.get_submodule(name.removeprefix("base_model.model."))
                target.weight.data += weight * layer.get_delta_weight("default").detach()
    tokens = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        found = PeftModel.from_pretrained(llama(), tmp_path / "out").eval()(tokens).logits
        expected = merged(tokens).logits
        assert (expected - base(tokens).logits).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


class TestFrozenEmbeddings:
    """PEFT saves an embedding's base weight beside its adapter, and any embedding after its vocabulary was resized."""

    def saved(self, path: Path, base: nn.Module, targets: list[str], method: type = LoraConfig) -> Path:
        model = get_peft_model(base, method(target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        model.save_pretrained(path, save_embedding_layers=True)
        return path

    def test_it_is_kept_under_the_name_that_it_has_beside_the_adapter(self, tmp_path):
        paths = [
            self.saved(tmp_path / "one", llama(), ["embed_tokens"], WaRAConfig),
            self.saved(tmp_path / "two", llama(), ["q_proj"]),
        ]
        (name,) = [key for key in load_file(paths[1] / "adapter_model.safetensors") if "embed_tokens" in key]
        assert name == "base_model.model.model.embed_tokens.weight"
        combine_adapters(paths, [1, 1], tmp_path / "out", "cat")
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert name not in tensors
        weight = tensors["base_model.model.model.embed_tokens.base_layer.weight"]
        assert torch.equal(weight, llama().model.embed_tokens.weight)
        other = llama()
        nn.init.zeros_(other.model.embed_tokens.weight)
        model = PeftModel.from_pretrained(other, tmp_path / "out")
        assert torch.equal(model.base_model.model.model.embed_tokens.base_layer.weight, weight)

    def test_two_that_differ(self, tmp_path, monkeypatch):
        changed = llama()
        changed.model.embed_tokens.weight.data[3] += 1
        paths = [
            self.saved(tmp_path / "one", llama(), ["embed_tokens"]),
            self.saved(tmp_path / "two", changed, ["embed_tokens"]),
            self.saved(tmp_path / "three", llama(vocab_size=41), ["q_proj"]),
        ]
        with pytest.raises(
            ValueError, match=r"hold different values of 'model\.embed_tokens.*on different base models"
        ):
            combine_adapters(paths[:2], [1, 1], tmp_path / "out", "cat")
        monkeypatch.setattr(TensorFile, "read", no_reading)
        with pytest.raises(ValueError, match=r"in different shapes: .* of different vocabularies"):
            combine_adapters(paths[1:], [1, 1], tmp_path / "out", "cat")
        assert not (tmp_path / "out").exists()


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["q_proj"], **fields})


def wara(**fields: Any) -> WaRAConfig:
    return WaRAConfig(**{"target_modules": ["q_proj"], **fields})


REFUSED: dict[str, tuple[Callable[[], nn.Module], PeftConfig, str]] = {
    "DoRA": (llama, lora(use_dora=True), r"has use_dora=True, .* merge it by PEFT"),
    "biases of LoRA": (llama, lora(lora_bias=True), r"has lora_bias=True, .* merge it by PEFT"),
    "experts": (
        mixture,
        lora(target_parameters=["mlp.experts.gate_up_proj"]),
        r"has target_parameters=\['mlp.experts.gate_up_proj'\], .* merge it by PEFT",
    ),
    "experts of WaRA": (
        mixture,
        wara(target_parameters=["mlp.experts.gate_up_proj"]),
        r"a bare parameter \(Experts\)",
    ),
    "modules_to_save": (llama, lora(modules_to_save=["lm_head"]), r"has modules_to_save=.*trained in full"),
    "modules_to_save of WaRA": (llama, wara(modules_to_save=["lm_head"]), r"has modules_to_save=.*trained in full"),
    "biases": (pieces, lora(target_modules=["a_up"], bias="all"), "has bias='all': what was trained in full"),
    "biases of WaRA": (pieces, wara(target_modules=["a_up"], bias="wara_only"), "has bias='wara_only': what was"),
    "tokens": (llama, lora(trainable_token_indices=[1]), r"has trainable_token_indices=.*: what was trained"),
    "grid": (
        mlp,
        wara(target_modules=["up"], form="grid", grid_size=(4, 4), num_prefix_tokens=0),
        "has form='grid', .* it has no ΔW",
    ),
    "tied": (
        llama,
        wara(target_modules=["embed_tokens"], ensure_weight_tying=True),
        "ensure_weight_tying=True, and only",
    ),
    "attention": (Attention, lora(target_modules=["attention"]), "is of an attention as a whole"),
    "attention of WaRA": (Attention, wara(target_modules=["attention"]), r"a bare parameter \(MultiheadAttention\)"),
    "factorised": (lambda: nn.ModuleDict({"layer": low_rank()}), wara(target_modules=["layer"]), "a factorised layer"),
    "groups": (
        lambda: nn.ModuleDict({"layer": nn.Conv2d(8, 8, 3, groups=4)}),
        lora(target_modules=["layer"], r=8),
        "of a convolution with 4 groups",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_combined(tmp_path, monkeypatch, case):
    make, config, message = REFUSED[case]
    get_peft_model(make(), config).save_pretrained(tmp_path / "one", save_embedding_layers=False)
    monkeypatch.setattr(TensorFile, "read", no_reading)
    for adapters in ([tmp_path / "one"], [tmp_path / "one"] * 2):
        with pytest.raises(ValueError, match=message):
            combine_adapters(adapters, [0.5] * len(adapters), tmp_path / "out", "cat")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ([1], {}, ValueError, "a weight for each adapter: 2 adapters, 1 weights"),
        ([1, math.nan], {}, ValueError, "The weight nan is not finite"),
        ([1, "2"], {}, TypeError, "a weight must be a number, and is '2'"),
        ([1, 1], {"combination_type": "mean"}, ValueError, "combination_type='mean' is not one of 'cat', 'linear'"),
        ([1, 1], {"combination_type": "ties"}, ValueError, "'ties' needs `density`, the share"),
        (
            [1, 1],
            {"combination_type": "dare_linear_svd", "density": 0},
            ValueError,
            "density=0 is the share of values",
        ),
        ([1, 1], {"combination_type": "dare_ties", "density": 1.5}, ValueError, "density=1.5 is the share of values"),
        ([1, 1], {"combination_type": "ties", "density": True}, TypeError, "density must be a number, and is True"),
        ([1, 1], {"combination_type": "cat", "density": 0.5}, ValueError, "density=0.5 has no meaning with .*'cat'"),
        ([1, 1], {"combination_type": "cat", "svd_rank": 2}, ValueError, "svd_rank=2 is for types that end in 'svd'"),
        ([1, 1], {"svd_rank": 0}, ValueError, "svd_rank=0 must be an int of at least 1"),
        ([1, 1], {"dtype": torch.int8}, TypeError, "dtype=torch.int8 must be a floating-point"),
        (
            [1, 1],
            {"combination_type": "linear"},
            ValueError,
            "'linear' needs adapters of one rank R, but '.*one' has 8, '.*two' has 16. Use 'svd', which takes any",
        ),
        (
            [1, 1],
            {"combination_type": "ties", "density": 0.5},
            ValueError,
            "but '.*one' has 8, '.*two' has 16. Use 'ties_svd'",
        ),
    ],
)
def test_arguments(tmp_path, monkeypatch, weights, options, error, message):
    paths = [save(tmp_path / "one", llama(), lora(r=8)), save(tmp_path / "two", llama(), wara())]
    monkeypatch.setattr(TensorFile, "read", no_reading)
    with pytest.raises(error, match=message):
        combine_adapters(paths, weights, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_paths(tmp_path):
    with pytest.raises(TypeError, match="adapters must be a list of paths, and is 'one'"):
        combine_adapters("one", [1], tmp_path / "out")
    with pytest.raises(TypeError, match=r"an adapter must be a str or os\.PathLike"):
        combine_adapters([1], [1], tmp_path / "out")
    with pytest.raises(ValueError, match="a weight for each adapter: 0 adapters, 0 weights"):
        combine_adapters([], [], tmp_path / "out")


def test_bases(tmp_path, monkeypatch, recwarn):
    """Names of one base may differ, and its sizes may not."""
    paths = [save(tmp_path / name, llama(), config) for name, config in (("one", lora()), ("two", wara()))]
    for path, base in zip(paths, ("org/model", "/home/me/model"), strict=True):
        fields = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": base}))
    with pytest.warns(
        UserWarning, match=r"base models of different names \('.*one' on 'org/model', '.*two' on '/home"
    ):
        made = combine_adapters(paths, [1, 1], tmp_path / "out")
    assert made.config.base_model_name_or_path == "org/model"
    recwarn.clear()
    combine_adapters(paths[:1] * 2, [1, 1], tmp_path / "twice")
    assert not recwarn.list

    paths.append(save(tmp_path / "three", llama(hidden_size=24), lora()))
    monkeypatch.setattr(TensorFile, "read", no_reading)
    message = r"is a Linear of sizes \(out, in\) \(16, 16\) in '.*one', and a Linear of \(24, 24\) in '.*three'"
    with pytest.raises(ValueError, match=message):
        combine_adapters(paths, [1, 1, 1], tmp_path / "other", "cat")


def test_broken_files(tmp_path):
    path = save(tmp_path / "one", llama(), lora())
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            combine_adapters([path, path], [1, 1], tmp_path / "out", "cat")
        assert not (tmp_path / "out").exists()

    save_file({**tensors, f"{key}A.weight": tensors[f"{key}A.weight"] * math.inf}, weights)
    refused("holds values that are not finite")
    save_file({name: value for name, value in tensors.items() if name != f"{key}B.weight"}, weights)
    refused("q_proj.lora_A.weight' without a lora_B that fits it")
    save_file({name: value for name, value in tensors.items() if name != f"{key}A.weight"}, weights)
    refused("holds 'model.layers.1.self_attn.q_proj.lora_B.weight', of which its config says nothing")
    save_file({"base_model.model.other": torch.ones(1)}, weights)
    refused("holds no lora_A")
    save_file(tensors, weights)
    config.write_text(json.dumps({**fields, "r": 5}))
    refused(r"of shape \(8, 16\), but its config asks for \(5, 16\)")
    config.write_text(json.dumps({**fields, "peft_type": "IA3"}))
    refused("is not of a WaRA adapter: its peft_type is 'IA3'")


def test_reading_a_lora_alone(tmp_path):
    path = save(tmp_path / "one", llama(num_hidden_layers=11), lora(target_modules=["q_proj"], use_rslora=True))
    saved = SavedLoraModules(path)
    assert list(saved.modules) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(11)]
    assert saved.scaling("model.layers.10.self_attn.q_proj") == 8 / math.sqrt(8)
