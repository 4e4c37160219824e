"""Statistics beside hooks and autograd by hand: what they sum up, what they leave out, and how they are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.compression.models import TwoLayers, batches, bert, for_causal, llama
from wara_peft.compression import calibrate, load_statistics, save_statistics


def inputs_by_hand(model: nn.Module, name: str, data: list[dict[str, Tensor]]) -> Tensor:
    """The unmasked inputs of a layer, (N, n), in float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        rows = []
        for batch in data:
            model(**batch)
            rows.append(seen.pop()[batch["attention_mask"].bool()])
    handle.remove()
    return torch.cat(rows).double()


class TestSums:
    def test_moment_and_mean_of_unmasked_inputs(self) -> None:
        model, data = bert(), batches(6)
        found = calibrate(model, data, show_progress_bar=False)
        for name in ("bert.encoder.layer.0.attention.self.key", "bert.encoder.layer.1.output.dense"):
            rows = inputs_by_hand(model, name, data)
            assert found[name].count == len(rows) == 6 * 24
            torch.testing.assert_close(found[name].moment.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[name].mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
        query, key = (found[f"bert.encoder.layer.0.attention.self.{part}"] for part in ("query", "key"))
        assert query.moment is key.moment  # one tensor for one input

    def test_fisher_is_that_of_each_sample(self) -> None:
        model, data = bert(), batches(2)
        name = "bert.encoder.layer.0.intermediate.dense"
        expected = torch.zeros(16)
        for batch in data:
            for index in range(4):
                one = {key: value[index : index + 1] for key, value in batch.items()}
                (gradient,) = torch.autograd.grad(model(**one).loss, model.get_submodule(name).weight)
                expected += gradient.square().sum(0)
        found = calibrate(model, data, ["fisher"], show_progress_bar=False)
        torch.testing.assert_close(found[name].fisher.float(), expected / 8, rtol=1e-4, atol=1e-10)

    def test_moment_of_gradients(self) -> None:
        model, data = llama().double(), for_causal(batches(4, labelled=False))
        name = "model.layers.1.mlp.up_proj"
        rows = []
        singles = [{key: value[i : i + 1] for key, value in batch.items()} for batch in data for i in range(4)]
        for batch in singles:
            kept: list[Tensor] = []
            handle = model.get_submodule(name).register_forward_hook(lambda *a, kept=kept: kept.append(a[2]))
            (gradient,) = torch.autograd.grad(model(**batch).loss, kept)
            handle.remove()
            rows.append(gradient[batch["attention_mask"].bool()])
        g = torch.cat(rows)
        found = calibrate(model, data, ["gradients", "inputs"], show_progress_bar=False)[name]
        assert found.gradients.dtype == torch.float64
        torch.testing.assert_close(found.gradients, g.T @ g / len(g), rtol=1e-10, atol=0)
        assert found.count == len(g) and found.moment is not None

    def test_bfloat16_sums_in_float64(self) -> None:
        model, data = llama(), batches(4, labelled=False)
        expected = calibrate(model, data, show_progress_bar=False)
        found = calibrate(model.bfloat16(), data, show_progress_bar=False)
        for name, entry in found.items():
            assert entry.moment.dtype == entry.mean.dtype == torch.float64
            torch.testing.assert_close(entry.moment, expected[name].moment, rtol=0.1, atol=0.05)

    def test_all_but_the_output_layer(self) -> None:
        names = calibrate(llama(), batches(4, labelled=False), show_progress_bar=False).keys()
        assert len(names) == 14 and "lm_head" not in names

    def test_at_most_so_many_batches_and_their_own_way_to_be_called(self) -> None:
        model, x = TwoLayers(), torch.randn(5, 40, 12)
        found = calibrate(model, iter(x), batches=2, show_progress_bar=False)["first"]
        rows = x[:2].double().flatten(0, 1)
        torch.testing.assert_close(found.moment, rows.T @ rows / 80, rtol=1e-5, atol=1e-6)
        found = calibrate(
            model, x, ["gradients"], loss_fn=lambda model, batch: model(batch).sum(), show_progress_bar=False
        )
        torch.testing.assert_close(found["second"].gradients, torch.ones(12, 12, dtype=torch.float64))


class TestGroups:
    def test_a_bound_on_memory_changes_passes_and_not_results(self) -> None:
        model, data = bert(), batches(6)
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        kinds = ["inputs", "gradients", "fisher"]
        whole = calibrate(model, data, kinds, show_progress_bar=False)
        assert len(calls) == 6 + 24  # one for each batch, and one for each sample
        groups = calibrate(model, data, kinds, max_bytes=24_000, show_progress_bar=False)
        assert len(calls) >= 30 + 3 * 30
        assert groups.keys() == whole.keys()
        for name, entry in whole.items():
            for what, tensor in entry.tensors().items():
                torch.testing.assert_close(getattr(groups[name], what), tensor, rtol=1e-5, atol=1e-9)

    def test_the_model_is_left_as_it_was(self) -> None:
        model = bert().train()
        model.bert.embeddings.requires_grad_(False)
        trains = [parameter.requires_grad for parameter in model.parameters()]
        calibrate(model, batches(6), ["inputs", "fisher"], show_progress_bar=False)
        assert model.training and [parameter.requires_grad for parameter in model.parameters()] == trains
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class TestDisk:
    def test_written_group_by_group_and_read_again(self, tmp_path: Path) -> None:
        model, data = bert(), batches(6)
        kinds = ["inputs", "gradients", "fisher"]
        expected = calibrate(model, data, kinds, max_bytes=24_000, show_progress_bar=False)
        found = calibrate(model, data, kinds, max_bytes=24_000, path=tmp_path / "a", show_progress_bar=False)
        assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
        for statistics in (found, load_statistics(tmp_path / "a")):
            assert list(statistics) == list(expected)
            for name, entry in statistics.items():
                assert (entry.shape, entry.count) == (expected[name].shape, expected[name].count)
                for what, tensor in expected[name].tensors().items():
                    assert torch.equal(getattr(entry, what), tensor)

    def test_what_layers_share_is_written_once(self, tmp_path: Path) -> None:
        statistics = calibrate(bert(), batches(6), show_progress_bar=False)
        save_statistics(tmp_path / "a", statistics)
        keys = load_file(tmp_path / "a" / "statistics-00001.safetensors").keys()
        assert sum(key.endswith("moment") for key in keys) == len({id(entry.moment) for entry in statistics.values()})
        assert sum(key.endswith("moment") for key in keys) < len(statistics)

    @pytest.mark.parametrize(
        ("damage", "error", "message"),
        [
            (lambda fields: fields.pop("layers"), ValueError, "has no layers"),
            (lambda fields: fields["layers"]["first"].update(file="../x.safetensors"), ValueError, "says of 'first'"),
            (lambda fields: fields["layers"]["first"].update(file="x.safetensors"), FileNotFoundError, "not beside"),
            (lambda fields: fields["layers"]["first"].update(shape=[20]), ValueError, "says of 'first'"),
            (lambda fields: fields["layers"]["first"].update(shape=[20, 13]), ValueError, "the moment of 'first'"),
            (lambda fields: fields["layers"]["first"]["tensors"].update(mean="none"), ValueError, "says of 'first'"),
        ],
    )
    def test_damage(self, tmp_path: Path, damage, error: type[Exception], message: str) -> None:
        path = tmp_path / "a"
        calibrate(TwoLayers(), torch.randn(3, 40, 12), path=path, show_progress_bar=False)
        fields = json.loads((path / "statistics.json").read_text())
        damage(fields)
        (path / "statistics.json").write_text(json.dumps(fields))
        with pytest.raises(error, match=message):
            load_statistics(path)

    def test_missing_and_cut_short(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"statistics\.json"):
            load_statistics(tmp_path)
        path = tmp_path / "a"
        calibrate(TwoLayers(), torch.randn(3, 40, 12), path=path, show_progress_bar=False)
        file = path / "statistics-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load_statistics(path)

    def test_nothing_is_left_of_a_failed_run(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not finite"):
            calibrate(TwoLayers(), torch.full((3, 40, 12), torch.nan), path=tmp_path / "a", show_progress_bar=False)
        assert list(tmp_path.iterdir()) == []


def with_nan() -> nn.Module:
    model = TwoLayers()
    nn.init.constant_(model.second.weight, torch.nan)
    return model


class TestBadInput:
    @pytest.mark.parametrize(
        ("model", "data", "arguments", "message"),
        [
            (TwoLayers(), [], {}, "gives no batches"),
            (TwoLayers(), torch.randn(3, 40, 12), {"batches": 0}, "batches=0 must be"),
            (TwoLayers(), torch.randn(3, 40, 12), {"statistics": ["hessian"]}, r"\['hessian'\] must be some of"),
            (TwoLayers(), torch.randn(3, 40, 12), {"statistics": []}, r"statistics=\[\] must be"),
            (TwoLayers(), torch.randn(3, 40, 12), {"max_bytes": 99}, "max_bytes=99 is less than module 'first'"),
            (TwoLayers(), torch.randn(3, 40, 12), {"target_modules": ["q"]}, "'q' matches no"),
            (TwoLayers(), torch.randn(3, 40, 12), {"statistics": ["fisher"]}, "returns no loss"),
            (TwoLayers().to("meta"), torch.randn(3, 40, 12), {}, "'first' cannot be factorised: .*meta"),
            (with_nan(), torch.randn(3, 40, 12), {}, "'second' cannot be factorised: .*NaN"),
            (TwoLayers(), torch.full((3, 40, 12), torch.inf), {}, "The moment of 'first' is not finite"),
            (nn.Linear(3, 3), [], {}, "model is itself a Linear"),
        ],
    )
    def test_says_which_layer_and_value(self, model: nn.Module, data, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            calibrate(model, data, **arguments, show_progress_bar=False)

    def test_quantized_weights_are_refused_by_name(self) -> None:
        model = TwoLayers()
        model.second.weight = nn.Parameter(torch.zeros(12, 20, dtype=torch.int8), False)
        with pytest.raises(ValueError, match=r"'second' cannot be factorised: .*int8, quantized"):
            calibrate(model, torch.randn(3, 40, 12), show_progress_bar=False)

    def test_too_few_samples(self) -> None:
        with pytest.warns(UserWarning, match=r"'first' \(10 positions, 12 inputs\).* at least 20 positions"):
            calibrate(TwoLayers(), torch.randn(1, 10, 12), show_progress_bar=False)

    def test_a_file_in_the_place_of_the_directory(self, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "x")  # a file, where a directory is to be
        with pytest.raises(ValueError, match="is a file"):
            calibrate(TwoLayers(), torch.randn(3, 40, 12), path=tmp_path / "x", show_progress_bar=False)
