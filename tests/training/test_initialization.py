"""First values of A: directions of the inputs against NumPy's SVD of all of them, and orthonormal rows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.references import Mlp, synthesis_matrix
from wara_peft import WaRAConfig, initialize_from_data
from wara_peft.calibration.input_moments import Moments
from wara_peft.layers.linear import Linear


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_orthogonal_rows(wavelet):
    layer = Linear(
        nn.Linear(20, 9), "default", "proj", WaRAConfig(init_weights="orthogonal", levels=2, wavelet=wavelet)
    )
    assert layer.get_delta_weight("default").abs().max() == 0
    factor = layer.factors("default")[0]
    for name in factor.subbands:
        rows = factor.subband(name)
        torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=0)
    assert not torch.allclose(factor.subband("aa2"), factor.subband("da2"))
    narrow = Linear(nn.Linear(3, 9), "default", "proj", WaRAConfig(init_weights="orthogonal")).factors("default")[0]
    columns = narrow.subband("aa1")  # (4, 2)
    torch.testing.assert_close(columns.T @ columns, torch.eye(2), atol=1e-5, rtol=0)


def model_of(**fields) -> PeftModel:
    torch.manual_seed(0)
    config = {"init_weights": "activation", "target_modules": ["up", "down"], "r": 2, **fields}
    return get_peft_model(Mlp(width=11), WaRAConfig(**config))


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 7, 11, generator=generator) * torch.linspace(3, 0.2, 11) for _ in range(count)]


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.filterwarnings("ignore:levels=")
def test_directions_of_the_inputs(wavelet, levels):
    model = model_of(wavelet=wavelet, levels=levels).train()
    drawn = {name: p.clone() for name, p in model.named_parameters()}
    seen: dict[str, list[torch.Tensor]] = {"up": [], "down": []}
    for name, inputs in seen.items():
        layer = getattr(model.base_model.model, name)
        layer.register_forward_pre_hook(lambda layer, args, inputs=inputs: inputs.append(args[0].flatten(0, -2)))

    initialize_from_data(model, batches(), show_progress_bar=False)

    for name, inputs in seen.items():
        x = torch.cat(inputs).double().numpy()
        factor_a, factor_b = getattr(model.base_model.model, name).factors("default")
        assert all(not columns.any() for columns in factor_b.parameters())
        for band in factor_a.subbands:
            level = int(band[2:])
            expected = np.linalg.svd(x @ synthesis_matrix(wavelet, x.shape[1], level, band[1]))[2][:2]
            found = factor_a.subband(band).detach().numpy()
            np.testing.assert_allclose(np.abs((found * expected).sum(1)), 1, atol=1e-4)
            np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-5)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert ("wara_A" in name) != torch.equal(parameter, drawn[name])
        assert parameter.requires_grad == ("wara" in name)


def test_batches_of_every_kind_and_the_mask():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(11, 4)

        def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.up(inputs)

    torch.manual_seed(0)
    model = get_peft_model(Masked(), WaRAConfig(init_weights="activation", target_modules=["up"]))
    x = torch.cat(batches())
    results = []
    mask = torch.ones(15, 9, dtype=torch.long)
    mask[:, 7:] = 0
    padded = torch.cat((x, torch.full((15, 2, 11), 1e3)), 1)
    for loader in ([x], [(x,)], [{"inputs": x}], [{"inputs": padded, "attention_mask": mask}], batches()):
        initialize_from_data(model, loader, show_progress_bar=False)
        rows = model.base_model.model.up.wara_A["default"].level1.detach().clone()
        results.append(rows.T @ rows)  # without signs
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], atol=1e-4, rtol=0)


def test_more_rank_than_directions_keeps_the_drawn_rows():
    model = model_of(r=8)
    drawn = model.base_model.model.up.factors("default")[0].subband("aa1").detach().clone()
    initialize_from_data(model, batches(), show_progress_bar=False)
    rows = model.base_model.model.up.factors("default")[0].subband("aa1").detach()
    torch.testing.assert_close(rows[:6] @ rows[:6].T, torch.eye(6), atol=1e-5, rtol=0)
    assert torch.equal(rows[6:], drawn[6:])


def test_it_trains_and_is_saved(tmp_path):
    model, x = model_of(), batches()[0]
    base = copy.deepcopy(model).unload()
    initialize_from_data(model, batches(), show_progress_bar=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    found = loaded(x)
    assert torch.equal(found, model(x))
    assert not torch.allclose(found, loaded.unload()(x))


class Half(nn.Module):
    """Its second layer is not used, as a branch that the batches do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(11, 4), nn.Linear(11, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


class Failing:
    """A dataloader that fails at its second batch."""

    def __iter__(self):
        yield batches()[0]
        raise OSError("no more data")


BAD_INPUTS = {
    "no such adapter": ({}, batches(), "other", ValueError, "Adapter 'other' is not in the model"),
    "another initialisation": ({"init_weights": True}, batches(), "default", ValueError, "another `init_weights`"),
    "no batches": ({}, [], "default", ValueError, "No batch reached module 'up'"),
    "inputs that are not finite": ({}, [torch.full((2, 11), torch.nan)], "default", ValueError, "'up' are not finite"),
    "a dataloader that fails": ({}, Failing(), "default", OSError, "no more data"),
    "a batch of another shape": ({}, [torch.zeros(2, 3)], "default", RuntimeError, "shapes cannot be multiplied"),
}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    hooks = any(module._forward_pre_hooks for module in model.modules())
    return not hooks and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_changes_nothing(case):
    fields, loader, adapter, error, message = BAD_INPUTS[case]
    model = model_of(**fields).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        initialize_from_data(model, loader, adapter, show_progress_bar=False)
    assert unchanged(model, before)
    assert model.training


def test_a_layer_that_no_batch_reaches_and_a_trained_adapter():
    model = get_peft_model(Half(), WaRAConfig(init_weights="activation", target_modules=["up", "down"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="No batch reached module 'down'"):
        initialize_from_data(model, batches(), show_progress_bar=False)
    assert unchanged(model, before)
    model.base_model.model.up.wara_B["default"].level1.data[0, 0] = 1.0
    with pytest.raises(ValueError, match=r"not new: its B is not zero in module 'up'.*before training"):
        initialize_from_data(model, batches(), show_progress_bar=False)


@pytest.mark.parametrize("init_weights", ["orthogonal", "activation"])
def test_for_linear_layers_alone(init_weights):
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 3)})
    with pytest.raises(TypeError, match=rf"conv \(Conv1d\) is not supported.*init_weights='{init_weights}'"):
        get_peft_model(model, WaRAConfig(init_weights=init_weights, target_modules=["up", "conv"]))
    assert type(model["up"]) is nn.Linear


@pytest.mark.parametrize("decoder_mask", [False, True])
def test_the_encoders_mask_is_not_put_on_decoder_tokens_of_equal_length(decoder_mask):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))
    config = WaRAConfig(init_weights="activation", target_modules=["q", "k", "v"], r=2)
    model = get_peft_model(base, config)
    ids = torch.randint(1, 40, (3, 6))
    mask = (torch.arange(6) < torch.tensor([[6], [4], [2]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)}
    if decoder_mask:
        batch["decoder_attention_mask"] = mask.flip(0)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    initialize_from_data(model, [batch], show_progress_bar=False)

    for name, inputs in seen.items():
        encoded = "encoder." in name or ("EncDecAttention" in name and not name.endswith(".q"))
        counted = mask if encoded else mask.flip(0) if decoder_mask else torch.ones_like(mask)
        x = inputs[counted.bool()].double().numpy()
        factor_a = model.base_model.model.get_submodule(name).factors("default")[0]
        for band in factor_a.subbands:
            expected = np.linalg.svd(x @ synthesis_matrix("haar", 16, 1, band[1]))[2][:2]
            found = factor_a.subband(band).detach().numpy()
            np.testing.assert_allclose(np.abs((found * expected).sum(1)), 1, atol=1e-3, err_msg=name)


class Shares(nn.Module):
    """Layers of which some see one tensor: always, in the first batch alone, or in every call but one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.calls == 0
        self.calls += 1
        result = self.a(x) + self.b(x) + self.c(x if first else x * 0.5)
        if self.calls != 2:
            result = result + self.d(x if first else x + 0)
        return self.a(result) + self.b(result)


def test_layers_that_share_an_input_share_its_moment_for_as_long_as_they_do():
    torch.manual_seed(0)
    model = get_peft_model(Shares(), WaRAConfig(init_weights="activation", target_modules=["a", "b", "c", "d"]))
    layers = [getattr(model.base_model.model, name) for name in "abcd"]
    expected = {layer: torch.zeros(6, 6, dtype=torch.float64) for layer in layers}
    moments = Moments(model)
    for layer in layers:
        layer.register_forward_pre_hook(moments.add)

        def reference(layer: nn.Module, args: tuple[torch.Tensor]) -> None:
            x = args[0].double()
            expected[layer] += x.T @ x

        layer.register_forward_pre_hook(reference)
    for _ in range(3):
        moments.start_batch({})
        with torch.no_grad():
            model(torch.randn(5, 6))
    found = moments.of_layers()
    for layer in layers:
        torch.testing.assert_close(found[layer].double(), expected[layer], atol=1e-4, rtol=1e-4)
    assert found[layers[0]] is found[layers[1]]
