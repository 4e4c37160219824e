"""WaRA on bitsandbytes' 4-bit and 8-bit layers on the CPU, against the dequantized weights."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.references import transform
from wara_peft import WaRAConfig, save_as_lora
from wara_peft.base_layers.own_forward import has_own_forward, reason_against_adapting
from wara_peft.base_layers.quantization import keep_unpacked

WARNING = "Merging quantizes W \\+ ΔW again"
pytestmark = pytest.mark.filterwarnings(f"ignore:{WARNING}")
# quantized layer: one row a case
KINDS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "fp4-double": {"quant_type": "fp4", "compress_statistics": True},
    "int8": None,
}
WIDTH, HIDDEN = 64, 128


class Mlp(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up = quantized(nn.Linear(WIDTH, HIDDEN), kind)
        self.down = quantized(nn.Linear(HIDDEN, WIDTH, bias=False), kind)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None):
        result = x + self.down(torch.relu(self.up(x)))
        return result if labels is None else ((result - labels).square().mean(), result)


def quantized(linear: nn.Linear, kind: str) -> nn.Module:
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, **KINDS[kind])
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def model_of(kind: str) -> tuple[Mlp, PeftModel]:
    torch.manual_seed(0)
    base = Mlp(kind)
    config = WaRAConfig(target_modules=["up", "down"], wavelet="db2", init_weights=False, wara_alpha=32)
    return base, get_peft_model(copy.deepcopy(base), config)


def dequantized(layer: nn.Module) -> torch.Tensor:
    return layer.get_base_weight().float().clone()


def step_of(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Half of the largest step of the quantization, for a row (8-bit) or a block of 64 (4-bit)."""
    if kind == "int8":
        return weight.abs().amax(1, keepdim=True) / 127
    blocks = weight.reshape(-1, 64)
    largest_gap = {"n": 0.31, "f": 0.34}[kind[0]] / 2  # of the code on [-1, 1]
    return (blocks.abs().amax(1, keepdim=True) * largest_gap * 1.1).expand_as(blocks).reshape(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_forward_and_backward(self, kind):
        base, model = model_of(kind)
        up = model.base_model.model.up
        x = torch.randn(5, WIDTH, requires_grad=True)
        expected = base.up(x.detach()) + x @ up.get_delta_weight("default").T
        torch.testing.assert_close(up(x), expected, atol=1e-4, rtol=1e-4)
        model.train()(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert ("wara" in name) == (parameter.grad is not None), name
            if "wara" in name:
                assert parameter.grad.abs().max() > 0
        assert x.grad.abs().max() > 0

    def test_merge_and_unmerge(self, kind):
        base, model = model_of(kind)
        up = model.base_model.model.up
        before, delta = dequantized(up), up.get_delta_weight("default").detach()
        model.eval()(torch.randn(2, WIDTH))  # repacks 4-bit weights on some CPUs, if nothing prevents it
        model.merge_adapter(safe_merge=True)
        merged = dequantized(up)
        target = before + delta
        assert ((merged - target).abs() <= step_of(target, kind)).all()
        assert (merged - target).norm() < 0.5 * delta.norm()
        model.unmerge_adapter()
        assert torch.equal(dequantized(up), before)
        assert type(up.base_layer) is type(base.up)

    def test_merging_warns_once_of_what_it_loses(self, kind):
        _, model = model_of(kind)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.warns(
                UserWarning, match=f"{WARNING} in 'up', 'down'.*`wara-peft merge --dequantize`"
            ) as caught:
                merge()
            assert len(caught) == 1
            if merge == model.merge_adapter:
                with warnings.catch_warnings(record=True) as more:
                    warnings.simplefilter("always")
                    model.merge_adapter()
                assert not any("--dequantize" in str(warning.message) for warning in more)
                model.unmerge_adapter()

    def test_merge_after_an_eval_forward_equals_merge_before(self, kind):
        _, model = model_of(kind)
        fresh, used = model, copy.deepcopy(model).eval()
        x = torch.randn(3, WIDTH)
        with torch.no_grad():
            used(x)
            used.state_dict()
        assert torch.equal(dequantized(used.base_model.model.up), dequantized(fresh.base_model.model.up))
        fresh, used = fresh.merge_and_unload(), used.merge_and_unload()
        assert isinstance(used.up, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        assert torch.equal(used.eval()(x), fresh.eval()(x))

    def test_training_after_an_eval_forward_has_the_same_gradients(self, kind):
        _, model = model_of(kind)
        x = torch.randn(3, WIDTH)
        gradients = []
        for evaluate_first in (False, True):
            trained = copy.deepcopy(model)
            if evaluate_first:
                with torch.no_grad():
                    trained.eval()(x)
                trained.state_dict()
            trained.train()(x).square().sum().backward()
            gradients.append([p.grad for p in trained.parameters() if p.requires_grad])
        torch.testing.assert_close(*gradients, atol=0, rtol=0)

    def test_trainer_saves_and_loads(self, kind, tmp_path):
        base, model = model_of(kind)
        x, labels = torch.randn(64, WIDTH), torch.randn(64, WIDTH)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            num_train_epochs=4,
            learning_rate=1e-2,
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            label_names=["labels"],
        )
        data = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert losses[-1] < losses[0]
        model.eval().save_pretrained(tmp_path / "wara")
        save_as_lora(tmp_path / "lora", model)
        for name in ("wara", "lora"):
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
            keep_unpacked(loaded)
            torch.testing.assert_close(loaded(x), model(x), atol=1e-4, rtol=1e-4)

    def test_a_failed_merge_leaves_everything_as_it_was(self, kind):
        _, model = model_of(kind)
        x = torch.randn(3, WIDTH)
        model.eval()
        expected = model(x)
        down = model.base_model.model.down
        before, good = dequantized(model.base_model.model.up), down.wara_A["default"].level1.data.clone()
        down.wara_A["default"].level1.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"NaNs detected.*'down'"):
            model.merge_and_unload(safe_merge=True)
        down.wara_A["default"].level1.data = good
        assert torch.equal(dequantized(model.base_model.model.up), before)
        assert torch.equal(model(x), expected)
        merged = model.merge_and_unload(safe_merge=True)
        assert merged(x).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
class TestOtherForms:
    """`form="tiny"` with the basis of the dequantized weight, and `form="grid"`, which leaves the weight alone."""

    def model_of(self, base: nn.Module, **fields) -> PeftModel:
        torch.manual_seed(0)
        config = WaRAConfig(target_modules=["up", "down"], init_weights=False, wara_alpha=32, **fields)
        return get_peft_model(copy.deepcopy(base), config)

    def train(self, model: PeftModel, x: torch.Tensor) -> None:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            model.train()(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    @pytest.mark.parametrize("save_basis", [True, False])
    def test_tiny(self, kind, save_basis, tmp_path):
        base = Mlp(kind)
        with torch.no_grad():
            base.eval()(torch.randn(2, WIDTH))  # repacks 4-bit weights on some CPUs, which the basis must not see
        model = self.model_of(base, form="tiny", save_basis=save_basis)
        up = model.base_model.model.up
        before = dequantized(up)
        singular = np.linalg.svd(transform(before.double().numpy(), "haar", 1)["dd1"])[1][:4]
        factor_a, factor_b = (factor.subband("dd1").double().numpy() for factor in up.factors("default"))
        np.testing.assert_allclose(np.diag(factor_a @ factor_a.T), singular, rtol=1e-5)
        np.testing.assert_allclose(np.diag(factor_b.T @ factor_b), singular, rtol=1e-5)

        x = torch.randn(5, WIDTH)
        self.train(model, x)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(loaded(x), model(x), atol=0 if save_basis else 1e-5, rtol=0)
        target = before + up.get_delta_weight("default").detach()
        model.merge_adapter(safe_merge=True)
        assert ((dequantized(up) - target).abs() <= step_of(target, kind)).all()

    @pytest.mark.parametrize("pairs", ["separate", "shared"])
    def test_grid(self, kind, pairs, tmp_path):
        base, x = Mlp(kind), torch.randn(2, 17, WIDTH)
        model = self.model_of(base, form="grid", grid_pairs=pairs, num_prefix_tokens=1)
        self.train(model, x)
        up = model.base_model.model.up
        plain = nn.Linear(WIDTH, HIDDEN)
        plain.load_state_dict({"weight": dequantized(up), "bias": base.up.bias.data})
        config = dataclasses.replace(model.peft_config["default"], target_modules=["up"])
        dense = get_peft_model(nn.ModuleDict({"up": plain}), config).base_model.model["up"].eval()
        dense.load_state_dict({k: v for k, v in up.state_dict().items() if "wara" in k}, strict=False)
        found, expected = up(x) - up.base_layer(x), dense(x) - dense.base_layer(x)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(loaded(x), model(x), atol=0, rtol=0)
        before = dequantized(up)
        with pytest.raises(ValueError, match=r"form='grid'.*cannot be merged"):
            model.merge_and_unload()
        assert torch.equal(dequantized(up), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_of_bitsandbytes_is_not_tried_with_weights_that_are_not_packed(kind):
    assert has_own_forward(Mlp(kind).up) and reason_against_adapting(Mlp(kind).up) is None


def test_tiny_needs_weights_that_can_be_read(monkeypatch):
    backend = ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr("wara_peft.injection.targets.resolve_quantization_backend", lambda *args, **kwargs: backend)
    base = Mlp("int8")
    with pytest.raises(ValueError, match=r"needs the weight of module 'up'.*gptq.*Use form='subband'"):
        get_peft_model(base, WaRAConfig(form="tiny", target_modules=["up"]))
    assert isinstance(base.up, bnb.nn.Linear8bitLt)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4", "fp4-double"])
def test_weights_packed_before_are_unpacked(kind):
    """On CPUs that do not repack, the eval forward changes nothing, and neither does keep_unpacked."""
    torch.manual_seed(0)
    layer = quantized(nn.Linear(WIDTH, HIDDEN), kind)
    before = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with torch.no_grad():
        layer.eval()(torch.randn(2, WIDTH))
    keep_unpacked(layer)
    after = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    # Block scales have been rounded to bfloat16, and with double quantization quantized once more.
    torch.testing.assert_close(after, before, atol=2e-3, rtol=2**-7)


def test_backends_that_cannot_merge_say_so_before_anything_changes():
    _, model = model_of("int8")
    model.base_model.model.down.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    up = model.base_model.model.up
    before = dequantized(up)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="Cannot merge into module 'down': gptq weights cannot be written"):
            merge()
    assert torch.equal(dequantized(up), before)
    assert not up.merged
