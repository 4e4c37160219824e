"""Each family of models with an adapter on all its linear layers: train, save, load, merge, export, unload.

Each test function is a column of the table in `models.py`; a family is built and trained once for all of them.
The models compute in float64, but many of them have norms or routers in float32, whose rounding is in `TOLERANCE`.
"""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import wara_peft
from tests.references import module_shapes
from wara_peft import WaRAConfig, reparametrize_lora

from .models import FAMILIES, Family

TOLERANCE = 1e-6
"""How much two outputs that should be equal may differ, as a share of the largest value."""
EFFECT = 1e-3
"""How much the adapter of each family changes the output at least, as such a share."""


@dataclass(repr=False)
class Trained:
    """A family's model with an adapter, after a step of training."""

    family: Family
    model: PeftModel
    before: Tensor
    after: Tensor
    state: dict[str, Tensor]
    warned: list[str]
    still: set[str]

    @property
    def endings(self) -> tuple[str, ...]:
        """How names of layers that "all-linear" leaves out end, after a dot."""
        return tuple(f".{name}" for name in self.family.left_out)

    def equals(self, model: nn.Module) -> None:
        """Assert that a model computes what the trained one does."""
        result = output(model.eval(), self.family)
        scale = float(self.after.abs().max())
        torch.testing.assert_close(result, self.after, rtol=0, atol=TOLERANCE * scale)

    def fresh(self) -> nn.Module:
        """The model as it was without an adapter."""
        return build(self.family)


def build(family: Family) -> nn.Module:
    """The model in float64, frozen, with no parameter that is zero or one in all its entries."""
    torch.manual_seed(0)
    model = family.build().eval().double()
    fixed = re.compile("|".join(getattr(model, "_keys_to_ignore_on_save", None) or ["(?!)"]))  # made from the config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not fixed.search(name):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    norms = batch_norms(model)
    if norms:  # where signals would fade away in eval mode
        for norm in norms:
            norm.train().momentum = 1.0
        output(model, family)
        model.eval()
    # PyTorch's products of matrices go another way where a parameter requires gradients, and round otherwise.
    return model.requires_grad_(False)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def output(model: nn.Module, family: Family, grad: bool = False) -> Tensor:
    """All floating tensors that a forward gives, one after the other."""
    inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in family.inputs.items()
    }
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        return torch.cat([tensor.flatten() for tensor in tensors(model(**inputs))])


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "items"):  # also the outputs of transformers and diffusers
        for _, item in value.items():
            yield from tensors(item)


def train(model: nn.Module, family: Family, part: str = ".wara_") -> set[str]:
    """A step of training towards noise, and the modules of which it leaves a factor where it was."""
    model.train()
    for norm in batch_norms(model):
        norm.eval()  # its running means would change the base model, which no adapter saves
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert before and all(part in name for name in before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    result = output(model, family, grad=True)
    (result - torch.randn_like(result)).square().mean().backward()
    optimizer.step()
    model.eval()
    names = [name for name, value in before.items() if torch.equal(model.get_parameter(name), value)]
    return {name.split(part)[0].removeprefix("base_model.model.") for name in names}


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest) -> Trained:
    family = FAMILIES[request.param]
    if family.needs:
        try:
            importlib.import_module(family.needs)
        except Exception as error:  # whatever a package that does not fit to the others raises
            pytest.skip(f"{family.needs} cannot be imported here: {type(error).__name__}: {error}")
    base = build(family)
    before = output(base, family)
    assert torch.equal(output(base, family), before), "the forward is not deterministic"
    state = {name: value.clone() for name, value in base.state_dict().items()}
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = WaRAConfig(target_modules="all-linear", r=2, wara_alpha=16.0, init_weights=False)
        model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
    still = train(model, family)
    return Trained(family, model, before, output(model, family), state, [str(w.message) for w in caught], still)


@contextmanager
def asked(family: Family, what: str) -> Iterator[None]:
    """A scope that has to raise what the family's row says of it, or nothing."""
    if what in family.refused:
        with pytest.raises(ValueError, match=family.refused[what]):
            yield
    else:
        yield


def test_the_table_is_long_enough():
    able = [name for name, family in FAMILIES.items() if not family.refused]
    assert len(FAMILIES) >= 60
    assert len(able) >= 55


def test_train(trained: Trained):
    assert (trained.after - trained.before).abs().max() > EFFECT * trained.after.abs().max()
    assert trained.after.isfinite().all()
    unexplained = [name for name in trained.still if not re.fullmatch(trained.family.still, name)]
    assert not unexplained
    assert bool(trained.still) == bool(trained.family.still)


def test_what_is_left_out_is_named_once(trained: Trained):
    said = [message for message in trained.warned if "all-linear" in message]
    assert len(said) == bool(trained.family.left_out)
    assert all(f"`exclude_modules={list(trained.family.left_out)}`" in message for message in said)
    fresh = trained.fresh()
    head = fresh.get_output_embeddings() if hasattr(fresh, "get_output_embeddings") else None  # as PEFT finds it
    linear = {
        name
        for name, module in fresh.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    left = linear - module_shapes(trained.model).keys()
    assert {name for name in left if not f".{name}".endswith(trained.endings)} == set()
    assert {ending for ending in trained.endings if any(f".{name}".endswith(ending) for name in left)} == set(
        trained.endings
    )


@pytest.mark.slow
def test_load(trained: Trained, tmp_path: Path):
    with asked(trained.family, "load"):
        trained.model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*(all-linear|[Mm]issing|[Uu]nexpected)")
            loaded = PeftModel.from_pretrained(trained.fresh(), tmp_path, autocast_adapter_dtype=False)
        assert module_shapes(loaded) == module_shapes(trained.model)
        trained.equals(loaded)


@pytest.mark.slow
def test_merge(trained: Trained):
    with asked(trained.family, "merge"):
        trained.equals(copy.deepcopy(trained.model).merge_and_unload())


@pytest.mark.slow
def test_export(trained: Trained, tmp_path: Path):
    with asked(trained.family, "export"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's, about its own ways
        wara_peft.save_as_lora(tmp_path, trained.model)
        trained.equals(PeftModel.from_pretrained(trained.fresh(), tmp_path, autocast_adapter_dtype=False))


@pytest.mark.slow
def test_unload(trained: Trained):
    with asked(trained.family, "unload"):
        unloaded = copy.deepcopy(trained.model).unload()
        state = unloaded.state_dict()
        assert state.keys() == trained.state.keys()
        assert all(torch.equal(value, trained.state[name]) for name, value in state.items())
        types = [[str(type(module)) for module in model.modules()] for model in (unloaded, trained.fresh())]
        assert types[0] == types[1]
        assert torch.equal(output(unloaded, trained.family), trained.before)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_reparametrized_lora(name: str, tmp_path: Path):
    """LoRA on all linear layers, reparametrised: it trains; plain PEFT loads it; it is taken over again; it merges."""
    family = FAMILIES[name]
    if family.needs:
        pytest.importorskip(family.needs, exc_type=Exception)
    base = build(family)
    before = output(base, family)
    torch.manual_seed(1)
    config = LoraConfig(target_modules="all-linear", exclude_modules=list(family.left_out), r=8, lora_alpha=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's, about models that it does not know
        model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
        report = reparametrize_lora(model)
        # What LoRA trains without having an effect, such as layers whose weights others read, is LoRA's affair.
        train(model, family, ".lora_")
        train(model, family, ".lora_")  # the first step leaves A where it is, as B is zero
        after = output(model, family)
        scale = float(after.abs().max())
        assert (after - before).abs().max() > EFFECT * scale
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        plain = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True, autocast_adapter_dtype=False)
        torch.testing.assert_close(output(plain.eval(), family), after, rtol=0, atol=TOLERANCE * scale)
        again = reparametrize_lora(plain)
        assert (again.modules, again.left) == (report.modules, report.left)
        torch.testing.assert_close(output(plain, family), after, rtol=0, atol=TOLERANCE * scale)
        merged = output(model.merge_and_unload().eval(), family)
        if "merge" in family.refused:  # PEFT merges LoRA into weights that are tied, which changes what ties them too
            loaded = PeftModel.from_pretrained(build(family), tmp_path, autocast_adapter_dtype=False)
            after = output(loaded.merge_and_unload().eval(), family)
    torch.testing.assert_close(merged, after, rtol=0, atol=TOLERANCE * scale)


def test_grid(trained: Trained):
    """Where tokens lie on a grid a step gives gradients; where they do not, an error says so before that."""
    family, base = trained.family, trained.fresh()
    config = WaRAConfig(form="grid", target_modules="all-linear", r=1, init_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="target_modules='all-linear'")
        if family.grid is not None:
            with pytest.raises(ValueError, match=family.grid):
                output(get_peft_model(base, config).double(), family)
            return
        model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
    result = output(model, family, grad=True)
    assert not torch.allclose(result, trained.before, atol=EFFECT * float(result.abs().max()))
    result.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
