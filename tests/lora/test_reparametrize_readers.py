"""What reads `weight` of a reparametrised LoRA, or does with the model what PyTorch does with models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from tests.lora.test_reparametrize_writers import X, first, plain, reparametrised, weights
from tests.references import synthesis_matrix
from wara_peft.forms import SubbandFactor

OUT = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@contextmanager
def syntheses() -> Iterator[list[Any]]:
    """A list that grows by one item with each factor that is synthesised."""
    calls: list[Any] = []
    synthesis_of = SubbandFactor.synthesis_of

    def counting(self: SubbandFactor, coefficients: Any) -> Tensor:
        calls.append(self)
        return synthesis_of(self, coefficients)

    with mock.patch.object(SubbandFactor, "synthesis_of", counting):
        yield calls


def dense(factor: Any) -> Tensor:
    """Â of one level as PyWavelets makes it, differentiable in the coefficients."""
    columns = {
        band: torch.from_numpy(synthesis_matrix(factor.axis.wavelet, factor.axis.length, 1, band)) for band in "ad"
    }
    return torch.stack([columns[band] @ row for band, row in zip(factor.axis.bands[1], factor.level1, strict=True)])


def test_facts_need_no_synthesis():
    model = reparametrised(dtype=torch.float32)
    weight, twin = weights(model)[0], weights(plain(model))[0]
    with syntheses() as calls:
        for fact in ("dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "is_cuda", "layout", "nbytes"):
            assert getattr(weight, fact) == getattr(twin, fact), fact
        for method in (
            "size",
            "dim",
            "numel",
            "stride",
            "is_contiguous",
            "is_floating_point",
            "element_size",
            "get_device",
        ):
            assert getattr(weight, method)() == getattr(twin, method)(), method
        assert len(weight) == len(twin)
        weight.detach(), weight.data, weight.requires_grad_(True)
    assert not calls


def test_a_step_synthesises_each_factor_once():
    model = reparametrised(dtype=torch.float32).train()
    with syntheses() as calls:
        model(X.float()).sum().backward()
    assert sorted(map(id, calls)) == sorted(id(m) for m in model.modules() if isinstance(m, SubbandFactor))


# Gradients through what is read.


class Times(torch.autograd.Function):
    """x Wᵀ, as kernels of other libraries compute it: they keep the weight for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: x @ w.T,
    "addmm": lambda x, w: torch.addmm(torch.zeros(5, 8).double(), x, w.t(), alpha=0.7),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "Function": Times.apply,
    "Function of a view": lambda x, w: Times.apply(x, w.view(8, 12)),
    "Function of .to": lambda x, w: Times.apply(x.float(), w.to(torch.float32)).double(),
    "slices": lambda x, w: torch.cat([x @ w[:3].T, x @ w[3:].T], 1),
    "rows": lambda x, w: torch.stack([x @ row for row in w], 1),
    "reshape": lambda x, w: (x[:, None] * w.reshape(1, 8, 12)).sum(-1),
    "clone": lambda x, w: x @ w.clone().T,
    "twice": lambda x, w: x @ w.T + (x @ w.T) * w.norm(),
    "concatenated": lambda x, w: (x @ torch.cat([w, w]).T)[:, 4:12],
}


@pytest.mark.parametrize("use", USES)
def test_gradients_through_the_weight(use):
    layer = first(reparametrised()).lora_A["default"]
    x = X.clone().requires_grad_()
    results = []
    for weight in (layer.weight, dense(layer.factor)):
        out = USES[use](x, weight)
        results.append([out, *torch.autograd.grad((out * OUT).sum(), [layer.factor.level1, x])])
    tolerance = 1e-5 if use == "Function of .to" else 1e-12
    torch.testing.assert_close(results[0], results[1], atol=tolerance, rtol=tolerance)


def test_gradient_of_the_weight_itself():
    layer = first(reparametrised()).lora_A["default"]
    weight = layer.weight
    (found,) = torch.autograd.grad((F.linear(X, weight) * OUT).sum(), weight)
    torch.testing.assert_close(found, OUT.T @ X, atol=1e-12, rtol=1e-12)


def test_reads_and_forwards_add_up():
    layer = first(reparametrised()).lora_A["default"]
    weight = layer.weight
    for out in (F.linear(X, weight), F.linear(X, layer.weight), layer(X), F.linear(X, weight) ** 2):
        (out * OUT).sum().backward()
    found = layer.factor.level1.grad
    layer.factor.level1.grad = None
    expected = X @ dense(layer.factor).T
    ((3 * expected + expected**2) * OUT).sum().backward()
    torch.testing.assert_close(found, layer.factor.level1.grad, atol=1e-12, rtol=1e-12)


def test_a_second_backward():
    layer = first(reparametrised()).lora_A["default"]
    out = (F.linear(X, layer.weight) * OUT).sum()
    out.backward(retain_graph=True)
    once = layer.factor.level1.grad.clone()
    out.backward()
    torch.testing.assert_close(layer.factor.level1.grad, 2 * once, atol=1e-12, rtol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("through", ["weight", "forward"])
def test_double_backward(through):
    layer = first(reparametrised()).lora_A["default"]
    x = X.clone().requires_grad_()
    results = []
    for own in (True, False):
        weight = layer.weight if own else dense(layer.factor)
        out = layer(x) if own and through == "forward" else F.linear(x, weight)
        grads = torch.autograd.grad((out**3).sum(), [layer.factor.level1, x], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [layer.factor.level1, x]))
    torch.testing.assert_close(results[0], results[1], atol=1e-9, rtol=1e-10)


def test_backward_after_a_step_is_refused():
    """PyTorch refuses it for LoRA, whose weight was then changed in place."""
    model = reparametrised()
    for one in (model, plain(model)):
        layer = first(one).lora_A["default"]
        out = F.linear(X.clone().requires_grad_(), layer.weight).sum()
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        F.linear(X, layer.weight).sum().backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"in.?place"):
            out.backward()


def test_a_weight_that_is_kept_has_present_values():
    model = reparametrised()
    layer = first(model).lora_A["default"]
    weight, detached, row = layer.weight, layer.weight.detach(), layer.weight.data[3]
    for _ in range(3):
        layer(X).square().sum().backward()
        torch.optim.SGD(layer.parameters(), 0.01).step()
        expected = dense(layer.factor).detach()
        for found in (weight, detached, layer.weight):
            torch.testing.assert_close(found.detach().clone(), expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(row.clone(), expected[3], atol=1e-12, rtol=1e-12)


def test_a_detached_weight_is_a_leaf_of_its_own():
    model = reparametrised()
    layer = first(model).lora_A["default"]
    for leaf in (layer.weight.detach().requires_grad_(), nn.Parameter(layer.weight)):
        (F.linear(X, leaf) * OUT).sum().backward()
        torch.testing.assert_close(leaf.grad, OUT.T @ X, atol=1e-12, rtol=1e-12)
    assert layer.factor.level1.grad is None
    layer.weight.detach().requires_grad_(False)
    assert layer.factor.level1.requires_grad
    layer.weight.requires_grad_(False)
    assert not layer.factor.level1.requires_grad
    layer.weight.requires_grad = True
    assert layer.factor.level1.requires_grad


# Other ways to read.

READERS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda w: w.detach().numpy(),
    "numpy, forced": lambda w: w.numpy(force=True),
    "asarray": lambda w: np.asarray(w.detach()),
    "dlpack of PyTorch": lambda w: torch.from_dlpack(w.detach()),
    "dlpack of NumPy": lambda w: np.from_dlpack(w.detach()),
    "tolist": lambda w: w.tolist(),
    "item": lambda w: w[2, 3].item(),
    "repr": lambda w: repr(w.detach()),
    "format": lambda w: f"{w[0, 0].detach():.6f}",
    "clone": lambda w: w.clone(),
    "detach and clone": lambda w: w.detach().clone(),
    "cpu": lambda w: w.detach().cpu(),
    "half": lambda w: w.half(),
    "float": lambda w: w.float(),
    "to": lambda w: w.detach().to("cpu", torch.bfloat16, copy=True),
    "contiguous": lambda w: w.data.contiguous(),
    "as_tensor": lambda w: torch.as_tensor(w),
    "tensor": lambda w: torch.tensor(w.tolist()),
    "Parameter": lambda w: nn.Parameter(w),
    "copy": lambda w: copy.copy(w),
    "deepcopy": lambda w: copy.deepcopy(w),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "svd": lambda w: torch.linalg.svdvals(w).round(decimals=12),
    "unbind": lambda w: list(w.unbind()),
    "where": lambda w: torch.where(w > 0, w, 0),
    "equal": lambda w: torch.equal(w, w.clone()),
    "empty_like": lambda w: torch.empty_like(w).shape,
    "zeros_like": lambda w: torch.zeros_like(w),
    "new_zeros": lambda w: w.new_zeros(3),
    "type": lambda w: w.type(),
    "bool": lambda w: bool((w == w).all()),
    "storage": lambda w: w.detach().untyped_storage().nbytes(),
    "typed storage": lambda w: list(w.detach().storage())[:5],
    "foreach": lambda w: torch._foreach_norm([w, w.data]),
    "is_pinned": lambda w: w.is_pinned(),
    "is_shared": lambda w: w.is_shared(),
    "offset": lambda w: (w.storage_offset(), w[2:].storage_offset()),
    "is_sparse": lambda w: w.is_sparse,
    "T": lambda w: (w.T, w.mT, w.H),
    "sum of squares": lambda w: (w**2).sum(1),
    "index_select": lambda w: w.index_select(0, torch.tensor([1, 1, 0])),
    "map": lambda w: [row.norm() for row in w],
    "fft": lambda w: torch.fft.fft(w).real,
    "vmap": lambda w: vmap(lambda row: row.sum())(w),
    "func.grad": lambda w: grad(lambda t: (t**3).sum())(w.detach()),
}


def as_arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().double().numpy()
    return [as_arrays(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_reader(name, mode):
    model = reparametrised()
    twin = plain(model)
    with mode():
        found, expected = (READERS[name](weights(one)[0]) for one in (model, twin))
        if name in ("repr", "copy"):
            found, expected = str(found)[:80], str(expected)[:80]
            assert found.removeprefix("Parameter containing:\n") == expected.removeprefix("Parameter containing:\n")
        else:
            np.testing.assert_equal(as_arrays(found), as_arrays(expected))


def test_numpy_cannot_write():
    array = weights(reparametrised())[0].detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 0


def test_an_address_stays_while_the_weight_is_held():
    weight = weights(reparametrised())[0].detach()
    address = weight.data_ptr()
    other = [torch.randn(8, 12).double() for _ in range(50)]
    values = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_double * 96).from_address(address)).reshape(8, 12)
    np.testing.assert_array_equal(values, weight.clone().numpy())
    del other


def test_saved_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    model = reparametrised()
    weight, expected = weights(model)[1], weights(plain(model))[1].detach()
    save_file({"w": weight.data}, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], expected)
    buffer = io.BytesIO()
    torch.save({"w": weight, "d": weight.detach()}, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert torch.equal(loaded["w"], expected) and torch.equal(loaded["d"], expected)
