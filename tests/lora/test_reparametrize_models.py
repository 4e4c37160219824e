"""What PyTorch does with a model whose LoRA is reparametrised: casts, copies, transforms, traces, modes, replicas."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from tests.injection.test_weight_tying import TOKENS, llama
from tests.lora.test_reparametrize_readers import OUT, dense
from tests.lora.test_reparametrize_writers import X, first, output, plain, reparametrised, weights
from tests.test_replicas import replica_of, scaled
from wara_peft import plain_lora, reparametrize_lora


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casts(dtype):
    model = reparametrised().to(dtype)
    assert {weight.dtype for weight in weights(model)} == {dtype}
    assert all(value.dtype == dtype for value in model.state_dict().values())
    torch.testing.assert_close(output(model), output(plain(model)), atol=0.03, rtol=0.03)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(thing: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_independent(how, tmp_path):
    model = reparametrised()
    before = output(model)
    other = COPIES[how](model)
    assert torch.equal(output(other), before)
    with torch.no_grad():
        for weight in weights(other):
            weight.mul_(2)
    assert torch.equal(output(model), before)
    assert not torch.allclose(output(other), before)
    other.save_pretrained(tmp_path)
    before = output(other)
    with torch.no_grad():
        weights(other)[0].zero_()
    other.load_adapter(tmp_path, "default")
    assert torch.equal(output(other), before)
    plain_lora(other)
    assert torch.equal(output(other), before)


def test_meta_device():
    model = reparametrised()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = output(model)
    model = model.to("meta")
    assert all(weight.is_meta and weight.shape in {(8, 12), (20, 8), (8, 20), (12, 8)} for weight in weights(model))
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(output(model), expected, atol=1e-12, rtol=1e-12)
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    torch.testing.assert_close(output(model), expected, atol=1e-12, rtol=1e-12)


def test_share_memory():
    model = reparametrised()
    before = output(model)
    weights(model)[0].share_memory_()
    assert first(model).lora_A["default"].factor.level1.is_shared()
    model.share_memory()
    assert all(weight.is_shared() for weight in weights(model))
    assert torch.equal(output(model), before)


# functorch


def test_functional_call_with_coefficients():
    model, other = reparametrised(), reparametrised(1)
    before = output(model)
    found = functional_call(model, dict(other.named_parameters()), (X,))
    torch.testing.assert_close(found, other(X), atol=1e-12, rtol=1e-12)
    assert torch.equal(output(model), before)


def test_vmap_over_models():
    models = [reparametrised(seed) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    found = vmap(lambda p, b: functional_call(models[0], (p, b), (X,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(X) for model in models]), atol=1e-12, rtol=1e-12)


def test_transforms_of_functions():
    """Gradients, Jacobians and forward derivatives by the chain rule, beside autograd through dense transforms."""
    model = reparametrised()
    layer = first(model).lora_A["default"]
    name = "level1"

    def loss(rows: Tensor) -> Tensor:
        return (functional_call(layer, {f"factor.{name}": rows}, (X,)) ** 2 * OUT).sum()

    def reading(rows: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(layer, {f"factor.{name}": rows}):
            return (F.linear(X, layer.weight) ** 2 * OUT).sum()

    rows = layer.factor.level1.detach()
    weight = dense(layer.factor)
    (expected,) = torch.autograd.grad(((X @ weight.T) ** 2 * OUT).sum(), layer.factor.level1)
    for function in (loss, reading):
        torch.testing.assert_close(grad(function)(rows), expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(jacrev(function)(rows), expected, atol=1e-10, rtol=1e-10)
        direction = torch.randn_like(rows)
        _, derivative = jvp(function, (rows,), (direction,))
        torch.testing.assert_close(derivative, (expected * direction).sum(), atol=1e-9, rtol=1e-10)
        each = vmap(grad(function))(torch.stack([rows, rows * 0]))
        torch.testing.assert_close(each[0], expected, atol=1e-10, rtol=1e-10)


def test_per_sample_gradients():
    model = reparametrised()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    each = vmap(grad(lambda p, x: functional_call(model, p, (x[None],)).square().sum()), (None, 0))(parameters, X)
    model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(each[name].sum(0), parameter.grad, atol=1e-10, rtol=1e-10)


# Tracing


def test_fake_tensors():
    model = reparametrised()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(model)
        for module in fake.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
        for weight, real in zip(weights(fake), weights(model), strict=True):
            assert isinstance(weight, FakeTensor) and weight.shape == real.shape and weight.dtype == real.dtype
        x = mode.from_tensor(X)
        assert fake(x).shape == (5, 3)
        assert F.linear(x, weights(fake)[0]).shape == (5, 8)
        assert model(X).shape == (5, 3)  # real parameters within the mode


@pytest.mark.slow
def test_export():
    model = reparametrised()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), model(X), atol=1e-12, rtol=1e-12)


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_compile(fields):
    model = reparametrised(**fields).train()
    expected = model(X)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    # PEFT's own DoRA breaks the graph where it reads the type of the base weight.
    found = torch.compile(model, fullgraph=not fields)(X)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    found.square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], grads, atol=1e-9, rtol=1e-9)


@pytest.mark.compiler
@pytest.mark.slow
def test_compiled_reads_of_the_weight():
    layer = first(reparametrised()).lora_A["default"]

    @torch.compile(fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        return F.linear(x.to(layer.weight.dtype), layer.weight) * layer.weight.shape[0]

    found = compiled(X)
    (gradient,) = torch.autograd.grad((found * OUT).sum(), layer.factor.level1)
    expected = 8 * X @ dense(layer.factor).T
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        gradient, torch.autograd.grad((expected * OUT).sum(), layer.factor.level1)[0], atol=1e-12, rtol=1e-12
    )


# Modes and wrappers of training


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_replicas_of_data_parallel(fields):
    model = reparametrised(dtype=torch.float32, **fields)
    replica, expected = replica_of(model, 1.5), scaled(model, 1.5)
    torch.testing.assert_close(replica(X.float()), expected(X.float()))
    replica(X.float()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    for found, value in zip(weights(replica), weights(expected), strict=True):
        torch.testing.assert_close(found.detach().clone(), value.detach().clone())
    model.zero_grad()
    F.linear(X.float(), weights(replica_of(model, 1.5))[0]).sum().backward()
    assert first(model).lora_A["default"].factor.level1.grad.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = reparametrised()
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], expected)

    def reading(x: Tensor) -> Tensor:
        return F.linear(x, weights(model)[0])

    model.zero_grad()
    checkpoint(reading, x, use_reentrant=reentrant).square().sum().backward()
    found = first(model).lora_A["default"].factor.level1.grad.clone()
    model.zero_grad()
    reading(x).square().sum().backward()
    torch.testing.assert_close(found, first(model).lora_A["default"].factor.level1.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant):
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    reparametrize_lora(model, project=True)
    model.train()
    grads = []
    for on in (False, True):
        if on:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=1e-10)
    assert len(grads[0]) == 4


def test_inference_mode():
    model = reparametrised()
    expected = output(model)
    with torch.inference_mode():
        assert torch.equal(model(X), expected)
        weight = weights(model)[0]
        row = weight[0]
        assert torch.equal(weight.clone(), weights(plain(model))[0])
        weight.mul_(1)
    row.detach().mul_(1)
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("reading", [False, True])
def test_autocast(reading):
    model = reparametrised(dtype=torch.float32)
    twin = plain(model)
    grads = []
    for one in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            out = F.linear(X.float(), weights(one)[0]) if reading else one(X.float())
        assert out.dtype == torch.bfloat16 if reading else out.dtype
        out.float().square().sum().backward()
        grads.append(first(one).lora_A["default"])
    weight_grad = grads[1].weight.grad.double()
    dense_grad = torch.autograd.grad(dense(grads[0].factor.double()), grads[0].factor.level1, weight_grad)[0]
    torch.testing.assert_close(grads[0].factor.level1.grad.double(), dense_grad, atol=0.05, rtol=0.05)


def test_data_parallel_on_cpu_and_summaries():
    """Things that walk over modules and print them."""
    model = reparametrised()
    assert nn.DataParallel(model)(X).shape == (5, 3)
    assert "wavelet='haar'" in repr(model)
    assert model.get_nb_trainable_parameters()[0] * 2 == plain(model).get_nb_trainable_parameters()[0]
