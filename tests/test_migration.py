"""From LoRA to WaRA: configs with the same scalings and parameters, and checkpoints that go on as they were."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, LoraRuntimeConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, replicate_layers
from torch import nn

from tests import models
from wara_peft import WaRAConfig
from wara_peft.config_fields.from_lora import IMPLIED, LORA_FIELDS, carried_fields
from wara_peft.layers.base import WaRALayer

OWN = WaRAConfig.__dataclass_fields__
LORA_FIELD_NAMES = [item.name for item in dataclasses.fields(LoraConfig)]
# A value that is not the default's of each field that is named as not carried.
NAMED = {
    "megatron_config": {"a": 1},
    "megatron_core": "megatron.other",
    "loftq_config": {"loftq_bits": 2},
    "eva_config": {"rho": 1.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"scale": "unit"},
    "use_dora": True,
    "velora_config": {"num_groups": 4},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": {"num_samples": 3},
    "layer_replication": [(0, 2)],
    "runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "lora_bias": True,
    "target_parameters": ["experts.down_proj"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
}


class Model(nn.Module):
    """Linears of even sizes under names that patterns tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"q": nn.Linear(16, 24), "k": nn.Linear(24, 16)})
        self.second = nn.ModuleDict({"q": nn.Linear(16, 24), "k": nn.Linear(24, 16)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (self.first, self.second):
            x = x + block["k"](torch.tanh(block["q"](x)))
        return x


def adapted(config, layer_class):
    model = get_peft_model(Model(), config)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, layer_class)}
    return model, layers


@pytest.mark.parametrize("name", LORA_FIELD_NAMES)
def test_every_field_of_lora_is_carried_over_or_named(name):
    carried = name in carried_fields(OWN) or name in IMPLIED
    assert carried != (name in NAMED and name not in OWN), f"{name} is a new field of LoraConfig"
    assert name in OWN or name in LORA_FIELDS


@pytest.mark.parametrize("name", sorted(set(NAMED) - OWN.keys()))
def test_what_is_not_carried_is_named_in_one_warning(name):
    config = LoraConfig(target_modules=["q"])
    setattr(config, name, NAMED[name])
    with pytest.warns(UserWarning, match=f"does not carry over {name}=") as caught:
        WaRAConfig.from_lora(config)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert not [other for other in NAMED if other != name and f" {other}=" in text]


@pytest.mark.parametrize("name", sorted(LORA_FIELDS.keys() - OWN.keys()))
def test_wrong_names_get_a_hint(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; .*[a-z]{{3}}"):
        WaRAConfig(**{name: 1})


@pytest.mark.parametrize("name", sorted(LORA_FIELDS.keys() - OWN.keys()))
def test_reading_a_field_of_lora_says_what_to_do(name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}', which is LoRA's: .*wara_peft.save_as_lora"):
        getattr(WaRAConfig(), name)


def test_other_attributes_are_missing_as_ever():
    config = WaRAConfig()
    assert getattr(config, "layer_replication", None) is None and not hasattr(config, "nothing")
    with pytest.raises(AttributeError, match=r"'WaRAConfig' object has no attribute 'nothing'$"):
        _ = config.nothing
    assert copy.deepcopy(config).to_dict() == pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_replicating_layers_first_is_what_lora_does():
    def llama() -> nn.Module:
        return models.llama(num_hidden_layers=3)

    layer_map = [[0, 2], [1, 3]]
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], layer_replication=layer_map)).eval()
    base = llama()
    replicate_layers(base, layer_map)
    model = get_peft_model(base, WaRAConfig(target_modules=["q_proj"])).eval()
    names = [
        {name for name, module in each.named_modules() if isinstance(module, BaseTunerLayer)} for each in (model, lora)
    ]
    assert names[0] == names[1] and len(names[0]) == 4
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(model(tokens, use_cache=False).logits, lora(tokens, use_cache=False).logits)


def test_loras_value_of_bias_gets_a_hint():
    with pytest.raises(ValueError, match="bias='wara_only'"):
        WaRAConfig(bias="lora_only")


def test_default_lora_carries_over_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WaRAConfig.from_lora(LoraConfig())


def test_values_of_carried_fields():
    lora = LoraConfig(
        target_modules=["q", "k"],
        exclude_modules=["second.k"],
        modules_to_save=["head"],
        layers_to_transform=[0],
        layers_pattern="layers",
        bias="lora_only",
        lora_dropout=0.25,
        init_lora_weights="orthogonal",
        trainable_token_indices=[3],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path="base",
        revision="abc",
        inference_mode=True,
        fan_in_fan_out=True,
    )
    config = WaRAConfig.from_lora(lora)
    same = carried_fields(OWN).keys() - {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias"}
    for name in same:
        assert getattr(config, carried_fields(OWN)[name]) == getattr(lora, name), name
    assert config.bias == "wara_only"


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("match", ["parameters", "rank"])
@pytest.mark.parametrize(
    "fields",
    [
        {"r": 16, "lora_alpha": 32},
        {"r": 7, "lora_alpha": 5},
        {"r": 1, "lora_alpha": 3},
        {"r": 6, "lora_alpha": 4, "rank_pattern": {"first.q": 5, "q": 3}, "alpha_pattern": {"second.*": 11, "k": 2}},
        {"r": 8, "lora_alpha": 8, "rank_pattern": {"k": 4, ".*q": 2}, "alpha_pattern": {"q": 1}},
    ],
)
def test_scaling_and_parameters_are_those_of_the_lora(fields, match, levels, use_rslora):
    lora_config = LoraConfig(target_modules=["q", "k"], use_rslora=use_rslora, **fields)
    lora, lora_layers = adapted(lora_config, LoraLayer)
    model, layers = adapted(WaRAConfig.from_lora(copy.deepcopy(lora_config), match, levels=levels), WaRALayer)
    assert layers.keys() == lora_layers.keys()
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(lora_layers[name].scaling["default"], rel=1e-12)
        if match == "rank":
            assert layer.r["default"] == lora_layers[name].r["default"]
    if match == "parameters":
        assert model.get_nb_trainable_parameters() == (
            lora.get_nb_trainable_parameters()[0],
            model.get_nb_trainable_parameters()[1],
        )


def test_what_from_lora_refuses():
    lora = LoraConfig()
    with pytest.raises(TypeError, match="a LoraConfig was expected"):
        WaRAConfig.from_lora(WaRAConfig())
    with pytest.raises(ValueError, match="match='ranks'"):
        WaRAConfig.from_lora(lora, match="ranks")
    for fields in ({"form": "shared"}, {"r": 3}, {"wara_alpha": 3}):
        with pytest.raises(ValueError, match="cannot be given to from_lora"):
            WaRAConfig.from_lora(lora, **fields)
    assert WaRAConfig.from_lora(lora, wavelet="db4").wavelet == "db4"
