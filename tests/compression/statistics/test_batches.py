"""How `calibrate` takes batches and calls: one by one, by any name, with inputs changed in place, and after a stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.compression.models import TwoLayers, llama
from wara_peft import WaRAConfig, initialize_from_data
from wara_peft.allocation import allocate_ranks
from wara_peft.compression import SVD, Activation, calibrate, compress, load_statistics

QUIET = {"show_progress_bar": False}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(6, 12))


def test_batches_are_fetched_when_they_are_needed() -> None:
    model, fetched, done = TwoLayers(), [], []
    model.register_forward_hook(lambda *_: done.append(len(fetched)))

    def without_end() -> Iterator[Tensor]:
        while True:
            fetched.append(1)
            yield torch.randn(40, 12)

    calibrate(model, without_end(), batches=3, **QUIET)
    assert done == [1, 2, 3] and len(fetched) == 3
    done.clear()
    fetched.clear()
    calibrate(model, without_end(), batches=3, max_bytes=8_000, **QUIET)  # two groups, with the same batches
    assert done == [1, 2, 3, 3, 3, 3] and len(fetched) == 3


@pytest.mark.filterwarnings("ignore:Too few samples")
def test_a_loader_without_a_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(TwoLayers(), DataLoader(Stream(), batch_size=2))["first"].count == 6
    assert "3it" in capsys.readouterr().err


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        result = self.first(input=x) + self.second(x)
        x.mul_(3).add_(1)
        return result + self.third(x)


@pytest.mark.parametrize("inference", [True, False])
def test_a_tensor_that_is_changed_between_two_layers_is_two_inputs(inference: bool) -> None:
    model, x = InPlace(), torch.randn(2, 30, 5)
    with torch.inference_mode(inference):
        found = calibrate(model, x, **QUIET)
    rows = x.double().flatten(0, 1)
    for name, seen in (("first", rows), ("second", rows), ("third", 3 * rows + 1)):
        torch.testing.assert_close(found[name].moment, seen.T @ seen / 60, rtol=1e-5, atol=1e-5)
    assert found["first"].moment is found["second"].moment


def test_sequential_compression_with_a_tensor_that_is_changed_in_place() -> None:
    model, x = InPlace(), torch.randn(2, 30, 5)
    with torch.no_grad():
        model.third.weight[:] = torch.randn(4, 5)
    weight = model.third.weight.detach().double()
    scale = torch.tensor([9.0, 1, 1, 1, 1])

    def forward(x: Tensor) -> Tensor:
        x = x.clone()
        return model.first(input=x) + model.third(input=x.mul_(scale))

    model.forward = forward
    found = calibrate(model, x, **QUIET)
    report = compress(model, Activation({"first": 2, "third": 2}), found, sequential=x, **QUIET)
    rows = (x * scale).double().flatten(0, 1)
    rows = rows - rows.mean(0)
    values = torch.linalg.svdvals(rows @ weight.T).square()
    assert report.layers[1].lost == pytest.approx(float(values[2:].sum() / values.sum()), rel=1e-4)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("statistics", [["inputs"], ["inputs", "fisher"]])
def test_padding_of_pytorchs_encoder(statistics: list[str], batch_first: bool, kind: torch.dtype) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first), 2)
    uses = encoder.use_nested_tensor
    x, lengths = torch.randn(5, 5, 8), torch.tensor([5, 3, 4, 1, 5])
    padding = torch.arange(5) >= lengths[:, None]
    if kind is not torch.bool:
        padding = torch.zeros(5, 5).masked_fill(padding, -torch.inf)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        states = batch[0] if batch_first else batch[0].transpose(0, 1)
        return model(states, src_key_padding_mask=batch[1]).square().mean()

    found = calibrate(encoder, [(x, padding)] * 2, statistics, loss_fn=loss_fn, **QUIET)
    seen: list[Tensor] = []
    handle = encoder.layers[1].linear1.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for row, length in zip(x, lengths, strict=True):
        encoder.train()(row[None, :length] if batch_first else row[:length, None])
    handle.remove()
    rows = torch.cat(seen).detach().double()
    entry = found["layers.1.linear1"]
    assert entry.count == 2 * len(rows) == 36
    torch.testing.assert_close(entry.moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert encoder.use_nested_tensor == uses


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


LOADER = DataLoader(TensorDataset(torch.randn(8, 8), torch.zeros(8)), batch_size=4)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: calibrate(model, LOADER, **QUIET),
        lambda model: calibrate(model, LOADER, ["fisher"], **QUIET),
        lambda model: calibrate(model, [{"x": torch.ones(2, 8), "y": torch.ones(2)}], **QUIET),
        lambda model: compress(model, SVD({"proj": 2}), sequential=LOADER, **QUIET),
        lambda model: allocate_ranks(model, WaRAConfig(target_modules=["proj"]), LOADER, budget=99),
    ],
)
def test_pairs_of_inputs_and_targets(call: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"does not fit the forward of OneLayer: .*Give batches of what the model takes, .*loss_fn\(model",
    ):
        call(OneLayer())


def test_pairs_of_inputs_and_targets_for_initialisation() -> None:
    model = get_peft_model(OneLayer(), WaRAConfig(target_modules=["proj"], init_weights="activation"))
    with pytest.raises(
        ValueError, match=r"does not fit the forward of OneLayer: .*Give batches of what the model takes"
    ):
        initialize_from_data(model, LOADER, show_progress_bar=False)


@pytest.mark.filterwarnings("ignore:Too few samples")
class TestInterrupted:
    KINDS = ("inputs", "fisher")

    def data(self) -> list[dict[str, Tensor]]:
        tokens = torch.randint(3, 40, (4, 2, 8))
        return [{"input_ids": ids, "labels": ids} for ids in tokens]

    def stopped(self, path: Path, error: type[BaseException] = KeyboardInterrupt) -> tuple[nn.Module, Any]:
        """Let the user interrupt in the third group; each group runs 4 batches, and 8 samples by themselves."""
        model, data, calls = llama(), self.data(), []

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            calls.append(1)
            if len(calls) == 2 * 12 + 3:
                raise error
            return model(**batch).loss

        with pytest.raises(error):
            calibrate(model, data, self.KINDS, max_bytes=24_000, path=path, loss_fn=loss_fn, **QUIET)
        return model, data

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_finished_groups_stay_and_the_next_call_goes_on(self, tmp_path: Path, error: type[BaseException]) -> None:
        path = tmp_path / "a"
        model, data = self.stopped(path, error)
        assert len(list(path.glob("*.safetensors"))) == 2
        with pytest.raises(FileNotFoundError, match=r"was interrupted; call it again, to go on"):
            load_statistics(path)
        expected = calibrate(model, data, self.KINDS, max_bytes=24_000, **QUIET)
        calls: list[int] = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        calibrate(model, data, self.KINDS, max_bytes=24_000, path=tmp_path / "whole", **QUIET)
        whole = len(calls)
        calls.clear()
        found = calibrate(model, data, self.KINDS, max_bytes=24_000, path=path, **QUIET)
        handle.remove()
        assert len(calls) == whole - 2 * 12
        assert found.keys() == expected.keys()
        for name, entry in expected.items():
            assert found[name].count == entry.count
            for what, tensor in entry.tensors().items():
                assert torch.equal(getattr(found[name], what), tensor)
        assert not (path / "unfinished.json").exists()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "whole"]

    def test_of_another_model_or_kind_is_refused_and_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        model, data = self.stopped(path)
        files = sorted(file.name for file in path.iterdir())
        for other, kinds, message in (
            (model, ("inputs",), r"unfinished statistics of kinds \['fisher', 'inputs'\], not \['inputs'\]"),
            (llama(), self.KINDS, "unfinished statistics of 'model.layers.0.* other weights"),
        ):
            with pytest.raises(ValueError, match=message):
                calibrate(other, data, kinds, max_bytes=24_000, path=path, **QUIET)
            assert sorted(file.name for file in path.iterdir()) == files
