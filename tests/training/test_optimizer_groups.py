"""Parameter groups with LoRA+'s learning rates, beside those that PEFT makes for LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from torch.optim import SGD, AdamW
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from tests.references import Mlp, tiny_vit
from wara_peft import WaRAConfig, optimizer_groups

PLAIN = {"aa0": 4, "aa1": 0, "ad1": 0, "da1": 0, "dd1": 0}


class Model(nn.Module):
    """Layers whose LoRA trains A, B, an embedding's pair, biases, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.conv = nn.Conv1d(12, 6, 3)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.norm(self.tokens(x))).transpose(1, 2)
        return self.head(self.conv(hidden).mean(2))


def settings_by_name(model: nn.Module, groups) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter that trains, which is in one group once."""
    by_id: dict[int, list[tuple[float, float]]] = {}
    for group in groups:
        for parameter in group["params"]:
            by_id.setdefault(id(parameter), []).append((group["lr"], group["weight_decay"]))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(by_id) == len(trained)
    assert all(len(by_id[id(parameter)]) == 1 for parameter in trained.values())
    return {name: by_id[id(parameter)][0] for name, parameter in trained.items()}


def in_loras_words(name: str) -> str:
    """LoRA's name of a parameter of the pair `aa0`."""
    layer, found, rest = name.partition(".wara_")
    if not found:
        return name
    letter, adapter, _ = rest.split(".")
    return (
        f"{layer}.lora_embedding_{letter}.{adapter}"
        if "tokens" in layer
        else f"{layer}.lora_{letter}.{adapter}.weight"
    )


@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.1, "lr_embedding": 3e-4}])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_rates_are_those_of_loraplus(bias, fields):
    common = {"target_modules": ["tokens", "up", "conv"], "modules_to_save": ["head", "norm"], "bias": bias}
    lora = get_peft_model(Model(), LoraConfig(r=4, **common))
    model = get_peft_model(Model(), WaRAConfig(subband_ranks=PLAIN, **common))
    given = {"loraplus_weight_decay": fields.get("weight_decay", 0.0)}
    if "lr_embedding" in fields:
        given["loraplus_lr_embedding"] = fields["lr_embedding"]
    theirs = create_loraplus_optimizer(lora, AdamW, lr=2e-4, loraplus_lr_ratio=16.0, **given)
    expected = settings_by_name(lora, theirs.param_groups)
    found = settings_by_name(model, optimizer_groups(model, 2e-4, 16.0, **fields))
    assert {in_loras_words(name): value for name, value in found.items()} == expected
    assert len(set(expected.values())) >= 3


def test_names_of_groups():
    model = get_peft_model(
        Model(), WaRAConfig(target_modules=["tokens", "up"], modules_to_save=["head"], bias="all", levels=2)
    )
    groups = {group["name"]: group for group in optimizer_groups(model, 1e-3, 4.0)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {name: sorted(names[id(item)] for item in group["params"]) for name, group in groups.items()}
    up, tokens = "base_model.model.up.", "base_model.model.tokens."
    assert members["A"] == [f"{up}wara_A.default.level1", f"{up}wara_A.default.level2"]
    assert members["B"] == [f"{up}wara_B.default.level1", f"{up}wara_B.default.level2"]
    assert members["embedding"] == [f"{tokens}wara_{x}.default.level{level}" for x in "AB" for level in (1, 2)]
    head = "base_model.model.head.modules_to_save.default."
    assert members["full"] == [f"{head}0.weight", f"{head}2.weight"]
    assert f"{head}1.weight" in members["vector"]
    assert f"{up}base_layer.bias" in members["vector"]
    assert groups.keys() == {"A", "B", "embedding", "full", "vector"}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"A": 1e-3, "B": 4e-3, "embedding": 1e-6, "full": 1e-3, "vector": 4e-3}
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"form": "shared"}, {"A": 1e-3, "B": 5e-3}),
        ({"form": "tiny"}, {"core": 1e-3}),
        ({"form": "tiny", "core": "diagonal"}, {"core": 1e-3}),
        ({"form": "grid"}, {"A": 1e-3, "B": 5e-3}),
        ({"form": "grid", "grid_pairs": "shared"}, {"A": 1e-3, "B": 5e-3, "gain": 1e-3}),
    ],
)
def test_parts_of_all_forms(fields, expected):
    model = get_peft_model(tiny_vit(), WaRAConfig(r=2, target_modules=["q_proj", "v_proj"], **fields))
    groups = optimizer_groups(model, 1e-3, 5.0, weight_decay=0.01)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(expected)
    assert {group["weight_decay"] for group in groups} == {0.01}
    settings_by_name(model, groups)


def test_experts():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=11, num_key_value_heads=1, num_local_experts=2, **sizes))
    model = get_peft_model(base, WaRAConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"]))
    groups = {group["name"]: group["params"] for group in optimizer_groups(model, 1e-3, 4.0)}
    settings_by_name(model, optimizer_groups(model, 1e-3, 4.0))
    assert {name: sorted(item.ndim for item in params) for name, params in groups.items()} == {
        "A": [2, 3],
        "B": [2, 3],
    }


def test_of_several_adapters_the_active_one():
    model = get_peft_model(Model(), WaRAConfig(target_modules=["up"], modules_to_save=["head"]))
    model.add_adapter("other", WaRAConfig(target_modules=["conv"], modules_to_save=["head"]))
    first = settings_by_name(model, optimizer_groups(model, 1e-3, 4.0))
    assert all(".default." in name for name in first)
    model.set_adapter("other")
    second = settings_by_name(model, optimizer_groups(model, 1e-3, 4.0))
    assert second
    assert all(".other." in name for name in second)


def test_models_of_transformers_with_add_adapter():
    model = tiny_vit()
    model.add_adapter(WaRAConfig(target_modules=["q_proj"]))
    model.classifier.requires_grad_(True)
    assert {group["name"] for group in optimizer_groups(model, 1e-3, 4.0)} == {"A", "B", "full", "vector"}


def test_lorafa_trains_a_which_can_be_frozen():
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up", "down"], init_weights=False))
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=4, lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(torch.randn(5, 12)).square().sum().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "wara_" in name}
    for name, parameter in model.named_parameters():
        if ".wara_A." in name:
            parameter.requires_grad_(False)
    assert [group["name"] for group in optimizer_groups(model, 1e-3, 4.0)] == ["B"]


def test_one_step_of_gradient_descent_moves_b_by_the_ratio():
    torch.manual_seed(0)
    model = get_peft_model(Mlp().double(), WaRAConfig(target_modules=["up", "down"], init_weights=False))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = SGD(optimizer_groups(model, 1e-2, 8.0))
    model(torch.randn(5, 12, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 8e-2 if "wara_B" in name else 1e-2
            torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)
            assert parameter.grad.abs().max() > 0


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randint(9, (5,), generator=generator), "labels": torch.tensor(index % 3)}


class WithLoss(Model):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}


def trainer(tmp_path, model: nn.Module, **fields) -> Trainer:
    args = TrainingArguments(
        tmp_path,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1.0,  # which the groups' own stand for
        weight_decay=0.5,
    )
    return Trainer(model, args, train_dataset=Rows(), **fields)


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_trainer_keeps_the_rates_and_resumes(tmp_path, how):
    torch.manual_seed(0)
    base = get_peft_model(WithLoss(), WaRAConfig(target_modules=["up", "conv"], modules_to_save=["head"]))

    def made(model):
        groups = optimizer_groups(model, 1e-3, 8.0, weight_decay=0.1)
        if how == "optimizers":
            return {"optimizers": (AdamW(groups), None)}
        return {"optimizer_cls_and_kwargs": (AdamW, {"params": groups})}

    model = copy.deepcopy(base)
    whole = trainer(tmp_path, model, **made(model))
    whole.train()
    assert {group["name"]: group["initial_lr"] for group in whole.optimizer.param_groups} == pytest.approx(
        {"A": 1e-3, "B": 8e-3, "full": 1e-3, "vector": 8e-3}
    )
    assert {group["name"]: group["weight_decay"] for group in whole.optimizer.param_groups} == {
        "A": 0.1,
        "B": 0.1,
        "full": 0.1,
        "vector": 0.0,
    }
    resumed_model = copy.deepcopy(base)
    resumed = trainer(tmp_path, resumed_model, **made(resumed_model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # The linear schedule has come to the same end in all groups, and every parameter to the same value.
    for ours, theirs in zip(resumed.optimizer.param_groups, whole.optimizer.param_groups, strict=True):
        assert ours["lr"] == theirs["lr"]
        assert ours["initial_lr"] == theirs["initial_lr"]
    for name, parameter in resumed_model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr_ratio": float("nan")}, "lr_ratio=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"lr_embedding": float("inf")}, "lr_embedding=inf"),
    ],
)
def test_rates_that_are_none(given, match):
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match=f"{match} must be finite"):
        optimizer_groups(model, **{"lr": 1e-3, "lr_ratio": 4.0, **given})


def test_models_without_an_adapter_that_trains():
    with pytest.raises(ValueError, match="No WaRA adapter of the model trains"):
        optimizer_groups(Mlp(), 1e-3, 4.0)
    with pytest.raises(ValueError, match="No WaRA adapter of the model trains"):
        optimizer_groups(get_peft_model(Mlp(), LoraConfig(target_modules=["up"])), 1e-3, 4.0)
    model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], inference_mode=True, modules_to_save=["head"]))
    with pytest.raises(ValueError, match="activate one by `set_adapter`"):
        optimizer_groups(model, 1e-3, 4.0)
