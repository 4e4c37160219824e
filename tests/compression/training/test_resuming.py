"""Trainings resume to the bit where transformers renames tensors, and are refused where anything is not as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTForImageClassification
from transformers.core_model_loading import revert_weight_conversion

from tests.compression.models import llama, vit
from wara_peft.compression import (
    LowRankLinear,
    OrderedRankTraining,
    StraightThroughFactorizer,
    TrainedRankPruning,
    factorize,
    load_compressed,
    low_rank_plus_sparse,
    ordered_low_rank,
    save_compressed,
    straight_through,
)
from wara_peft.compression.training.callback import TrainingMethod

Method = tuple[Callable[[nn.Module], object], Callable[[], TrainingMethod]]
METHODS: dict[str, Method] = {
    "Maestro": (ordered_low_rank, lambda: OrderedRankTraining(penalty=1e-2, threshold=0.12)),
    "TRP": (lambda model: None, lambda: TrainedRankPruning(energy=0.7, penalty=1e-3, period=2)),
    "DSFormer": (lambda model: straight_through(model, 8, 4, 2, r".*(fc1|up_proj)"), StraightThroughFactorizer),
}
STOP, STEPS = 6, 8


def images() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"pixel_values": torch.randn(1, 8, 8), "labels": torch.randint(3, ())} for _ in range(16)]


def texts() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 40, (16, 8))]


MODELS = {"vit": (vit, images), "llama": (llama, texts)}


def trainer(name: str, path: Path, steps: int, kind: str = "vit", seed: int = 0, **fields: Any) -> Trainer:
    make, rows = MODELS[kind]
    torch.manual_seed(seed)
    model = make()
    convert, callback = METHODS[name]
    convert(model)
    arguments = TrainingArguments(
        path, max_steps=steps, save_steps=STOP, per_device_train_batch_size=4, report_to=[], use_cpu=True, seed=3,
        disable_tqdm=True, logging_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", **fields,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows(), callbacks=[callback()])


def equal(one: nn.Module, other: nn.Module) -> bool:
    state, found = other.state_dict(), one.state_dict()
    return found.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in found.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """For each method, a ViT that was trained without a break, and the directory of one that stopped."""
    found = {}
    for name in METHODS:
        path = tmp_path_factory.mktemp(name)
        whole = trainer(name, path / "whole", STEPS)
        whole.train()
        trainer(name, path / "part", STOP).train()
        found[name] = whole.model, path / "part"
    return found


def with_names_of_transformers(checkpoint: Path) -> None:
    """Rename the tensors as transformers does for a dense model, and as releases before these marks had them."""
    model = vit()
    vars(model).pop("_weight_conversions", None)
    tensors = load_file(checkpoint / "model.safetensors")
    renamed = revert_weight_conversion(model, tensors)
    assert renamed.keys() != tensors.keys()
    save_file(renamed, checkpoint / "model.safetensors", metadata={"format": "pt"})


def without_marks(checkpoint: Path, name: str) -> None:
    path = checkpoint / "trainer_state.json"
    fields = json.loads(path.read_text())
    callback = type(METHODS[name][1]()).__name__
    if name == "TRP":
        del fields["stateful_callbacks"][callback]["attributes"]["_marks"]
    else:
        del fields["stateful_callbacks"][callback]
    path.write_text(json.dumps(fields))


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to / f"checkpoint-{STOP}"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
class TestOfAViT:
    def test_resumes_to_the_bit(self, runs, tmp_path: Path, name: str) -> None:
        whole, run = runs[name]
        checkpoint = copied(run, tmp_path / "run")
        # Another seed, so that all values come from the checkpoint.
        resumed = trainer(name, tmp_path / "run", STEPS, seed=9)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert equal(resumed.model, whole)
        save_compressed(resumed.model, tmp_path / "a")
        assert equal(load_compressed(tmp_path / "a"), whole)

    @pytest.mark.parametrize("marks", [True, False])
    @pytest.mark.parametrize("place", ["output_dir", "resume_from_checkpoint"])
    def test_loads_renamed_weights(self, runs, tmp_path: Path, name: str, marks: bool, place: str) -> None:
        whole, run = runs[name]
        checkpoint = copied(run, tmp_path / "run")
        with_names_of_transformers(checkpoint)
        if not marks:
            without_marks(checkpoint, name)
        fields = {} if place == "output_dir" else {"resume_from_checkpoint": str(checkpoint)}
        path = tmp_path / ("run" if place == "output_dir" else "other")
        resumed = trainer(name, path, STEPS, seed=9, **fields)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert equal(resumed.model, whole)

    def test_refuses_weights_that_are_elsewhere(self, runs, tmp_path: Path, name: str) -> None:
        checkpoint = copied(runs[name][1], tmp_path / "run")
        with_names_of_transformers(checkpoint)
        with pytest.raises(ValueError, match=r"cannot go on from step 6: '.* than in the checkpoint|the shape"):
            trainer(name, tmp_path / "other", STEPS, seed=9).train(resume_from_checkpoint=str(checkpoint))
        without_marks(checkpoint, name)
        with pytest.raises(ValueError, match="of step 6 does not tell what its weights are"):
            trainer(name, tmp_path / "other", STEPS, seed=9).train(resume_from_checkpoint=str(checkpoint))

    def test_refuses_other_weights_and_moments(self, runs, tmp_path: Path, name: str) -> None:
        run = runs[name][1]

        def weights(checkpoint: Path) -> None:
            tensors = load_file(checkpoint / "model.safetensors")
            tensors["vit.layernorm.weight"] *= 1 + 1e-5
            save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})

        def moments(checkpoint: Path) -> None:
            state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
            state["state"][0]["exp_avg"] += 1
            torch.save(state, checkpoint / "optimizer.pt")

        for index, (damage, message) in enumerate(
            [
                (weights, "'vit.layernorm.weight' has other values than in the checkpoint"),
                (moments, "exp_avg' has other values than in the checkpoint"),
                (lambda checkpoint: (checkpoint / "optimizer.pt").unlink(), "exp_avg' is missing"),
            ]
        ):
            checkpoint = copied(run, tmp_path / str(index))
            damage(checkpoint)
            resumed = trainer(name, tmp_path / str(index), STEPS, seed=9)
            with pytest.raises(ValueError, match=message):
                resumed.train(resume_from_checkpoint=str(checkpoint))
            assert resumed.state.global_step == STOP


@pytest.mark.slow
def test_maestro_was_cut(runs) -> None:
    """The case of the segmentation fault: moments of fewer components than the factors of a model at full rank."""
    tensors = load_file(runs["Maestro"][1] / f"checkpoint-{STOP}" / "model.safetensors")
    ranks = [len(value) for key, value in tensors.items() if key.endswith("down.weight")]
    assert min(ranks) < 16 and isinstance(runs["Maestro"][0], ViTForImageClassification)
    assert any(isinstance(module, LowRankLinear) for module in runs["Maestro"][0].modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_callbacks_that_trainer_restores_keep_their_arguments(tmp_path: Path, name: str) -> None:
    fields = {"restore_callback_states_from_checkpoint": True}
    whole = trainer(name, tmp_path / "a", STEPS, "llama")
    whole.train()
    trainer(name, tmp_path / "b", STOP, "llama").train()
    resumed = trainer(name, tmp_path / "b", STEPS, "llama", seed=9, **fields)
    arguments = [one.arguments() for one in resumed.callback_handler.callbacks if isinstance(one, TrainingMethod)]
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{STOP}"))
    assert equal(resumed.model, whole.model)
    restored = [one for one in resumed.callback_handler.callbacks if isinstance(one, TrainingMethod)]
    assert [one.arguments() for one in restored] == arguments


@pytest.mark.slow
def test_moments_of_other_shapes_are_refused_without_marks(tmp_path: Path) -> None:
    trainer("Maestro", tmp_path, STOP).train()
    checkpoint = tmp_path / f"checkpoint-{STOP}"
    without_marks(checkpoint, "Maestro")
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for moments in state["state"].values():
        if moments["exp_avg"].dim() == 2:
            moments["exp_avg"] = moments["exp_avg"][:1]
    torch.save(state, checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=r"exp_avg' has the shape \(1, .*\), and its parameter"):
        trainer("Maestro", tmp_path, STEPS).train(resume_from_checkpoint=str(checkpoint))


def sparse(model: nn.Module) -> None:
    low_rank_plus_sparse(model, 2, 0.1)


def few_ranks(model: nn.Module) -> None:
    factorize(model, 0.5, "random")


@pytest.mark.slow
@pytest.mark.parametrize("convert", [sparse, few_ranks])
@pytest.mark.parametrize("shards", [False, True])
def test_trainer_itself_resumes_what_needs_no_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Callable[[nn.Module], None], shards: bool
) -> None:
    monkeypatch.setitem(METHODS, "none", (convert, TrainerCallback))
    if shards:
        write = ViTForImageClassification.save_pretrained
        small = {"max_shard_size": "4KB"}
        monkeypatch.setattr(
            ViTForImageClassification, "save_pretrained", lambda *args, **kwargs: write(*args, **kwargs, **small)
        )
    whole = trainer("none", tmp_path / "a", STEPS)
    whole.train()
    trainer("none", tmp_path / "b", STOP).train()
    checkpoint = tmp_path / "b" / f"checkpoint-{STOP}"
    assert (len(list(checkpoint.glob("*.safetensors"))) > 1) == shards
    resumed = trainer("none", tmp_path / "b", STEPS, seed=9)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert equal(resumed.model, whole.model)
    assert equal(load_compressed(tmp_path / "b" / f"checkpoint-{STEPS}"), whole.model)
