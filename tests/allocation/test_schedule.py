"""`RankSchedule`: AdaLoRA's averages and choice, its budget in parameters, and Trainer's life around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from wara_peft import RankSchedule, WaRAConfig, to_lora
from wara_peft.allocation.budget import CubicBudget
from wara_peft.allocation.greedy import units_that_fit
from wara_peft.allocation.sensitivity import Sensitivity
from wara_peft.layers.lookup import layers_of

FILE = "rank_schedule.safetensors"


class Regression(nn.Module):
    """Two layers of unlike size, with the loss of a regression."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        prediction = self.second(torch.tanh(self.first(x)))
        return {"loss": (prediction - labels).square().mean(), "logits": prediction}


def adapted(**fields) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Regression(), WaRAConfig(**{"target_modules": ["first", "second"], "r": 4, **fields}))


def data(number: int = 64) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(12), "labels": torch.randn(4)} for _ in range(number)]


# Pairs of the first layer have 6 + 8 parameters, those of the second 8 + 2.
SIZE = 16 * 14 + 16 * 10
BUDGET = 150


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "wara_" in name)


def unmasked(model: nn.Module) -> int:
    """Parameters of the components whose column of B is not zero."""
    total = 0
    for layer in layers_of(model, "default").values():
        columns = layer.wara_B["default"].level1
        total += int(columns.any(0).sum()) * (columns.shape[0] + layer.wara_A["default"].level1.shape[1])
    return total


class Deep(Regression):
    """A regression with one layer that no adapter touches, and one that trains in full."""

    def __init__(self) -> None:
        super().__init__()
        self.third, self.head = nn.Linear(6, 7), nn.Linear(5, 3)


LORAS = {
    "the adapter's modules": {},
    "all linear": {"target_modules": "all-linear"},
    "one that the adapter does not have": {"target_modules": ["first", "third"]},
    "a pattern": {"target_modules": "first|head"},
    "ranks by name": {"target_modules": "all-linear", "rank_pattern": {"first": 1}},
}


@pytest.mark.parametrize("fields", LORAS.values(), ids=LORAS)
def test_a_lora_is_counted_as_peft_makes_it(fields):
    torch.manual_seed(0)
    config = WaRAConfig(target_modules=["first", "second"], modules_to_save=["head"], r=40)
    model = get_peft_model(Deep(), config)
    schedule = RankSchedule(like=LoraConfig(r=2, **fields))
    schedule.start(model, 10)
    lora = get_peft_model(Deep(), LoraConfig(r=2, **{"target_modules": ["first", "second"], **fields}))
    assert schedule.running.budget.last == lora.get_nb_trainable_parameters()[0]
    assert model.base_model.model.first is layers_of(model, "default")["first"]


def test_a_lora_that_adapts_nothing_is_refused():
    with pytest.raises(ValueError, match=r"name no module of the model"):
        RankSchedule(like=LoraConfig(r=2, target_modules=["none"])).start(adapted(), 10)


class Recorder(TrainerCallback):
    """Calls a function after each step of the optimizer; stands after the schedule in the list of callbacks."""

    def __init__(self, record: Callable[..., None]) -> None:
        self.record = record

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.record(model, state.global_step + 1)


def trainer(model: nn.Module, folder: Path, schedule: RankSchedule, *callbacks: TrainerCallback, **options) -> Trainer:
    arguments = TrainingArguments(
        folder,
        max_steps=options.pop("max_steps", 40),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy=options.pop("save_strategy", "no"),
        disable_tqdm=True,
        label_names=["labels"],
        **options,
    )
    return Trainer(model, arguments, train_dataset=data(), eval_dataset=data(8), callbacks=[schedule, *callbacks])


class TestParts:
    def test_budget_is_cubic_and_ends_at_the_target(self):
        budget = CubicBudget(first=1000, last=200, total=100, warmup=10, final=30)
        assert [budget.at(step) for step in (0, 10, 70, 71, 100)] == [1000, 1000, 200, 200, 200]
        assert budget.at(40) == 200 + 800 // 8
        values = [budget.at(step) for step in range(101)]
        assert values == sorted(values, reverse=True)

    def test_what_is_affordable(self):
        # The third does not fit any more, the last does; a tie goes to the first.
        assert units_that_fit([3.0, 4.0, 2.0, 1.0], [2, 1, 2, 1], 4) == [True, True, False, True]
        assert units_that_fit([1.0, 1.0], [3, 3], 5) == [True, False]

    def test_choices_are_those_of_adalora_where_costs_are_equal(self):
        """PEFT's allocator, whose singular values are zero here, and so score nothing."""
        torch.manual_seed(0)
        rank, budget, steps = 6, 7, 5
        config = AdaLoraConfig(init_r=rank, target_r=3, total_step=100, target_modules=["first", "second"])
        model = get_peft_model(Regression(), config)
        allocator = RankAllocator(model, config, "default")
        sides = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
        ours = Sensitivity(sides, config.beta1, config.beta2)
        for _ in range(steps):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.grad = torch.randn_like(parameter)
            for parameter in sides.values():
                parameter.data.normal_()
            allocator.update_ipt(model)
            ours.update()
        for name in sides:
            torch.testing.assert_close(ours.average[name], allocator.exp_avg_ipt[name])
            torch.testing.assert_close(ours.score(name), allocator._element_score(name))
        expected = allocator.mask_to_budget(model, budget)
        scores = []
        for name in expected:
            rows, columns = (ours.score(name.replace("lora_E", side)) for side in ("lora_A", "lora_B"))
            scores += (rows.mean(1) + columns.mean(0)).tolist()
        chosen = units_that_fit(scores, [1] * len(scores), budget)
        assert chosen == [flag for flags in expected.values() for flag in flags]
        assert sum(chosen) == budget

    def test_gradients_that_overflowed_are_left_out(self):
        weight = nn.Parameter(torch.ones(2, 2))
        found = Sensitivity({"w": weight}, 0.5, 0.5)
        with pytest.raises(ValueError, match="No parameter of the adapter has a gradient"):
            found.update()
        weight.grad = torch.full((2, 2), float("inf"))
        found.update()
        assert not found.average["w"].any()
        weight.grad = torch.full((2, 2), -3.0)
        found.update()
        assert (found.average["w"] == 1.5).all() and (found.deviation["w"] == 0.75).all()


class TestTrainer:
    def test_budget_holds_at_every_choice_and_shapes_change_at_the_end(self, tmp_path: Path):
        model = adapted()
        seen: dict[int, tuple[int, int]] = {}
        record = Recorder(lambda model, step: seen.update({step: (size_of(model), unmasked(model))}))
        schedule = RankSchedule(BUDGET, warmup=8, final=10, interval=4)
        run = trainer(model, tmp_path, schedule, record)
        run.train()
        assert {size for size, _ in seen.values()} == {SIZE}  # no shape changes on the way
        budget = CubicBudget(SIZE, BUDGET, 40, 8, 10)
        for step in (12, 16, 20, 24, 28):
            assert budget.at(step) - 14 < seen[step][1] <= budget.at(step)
        assert seen[8][1] == seen[11][1] == SIZE
        assert seen[13][1] > seen[12][1]  # what is masked grows again
        fixed = {unmasked for step, (_, unmasked) in seen.items() if step >= 30}
        assert len(fixed) == 1 and BUDGET - 10 < fixed.pop() <= BUDGET
        assert BUDGET - 10 < size_of(model) <= BUDGET

        before = model(**{key: value[None] for key, value in data(1)[0].items()})["logits"]
        run.save_model(tmp_path / "final")
        saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
        assert sum(value.numel() for value in saved.values()) == size_of(model)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(Regression(), tmp_path / "final")
        after = loaded(**{key: value[None] for key, value in data(1)[0].items()})["logits"]
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
        config, _ = to_lora(model)
        ranks = [layer.total_rank("default") for layer in layers_of(model, "default").values()]
        assert config.r == max(ranks) and sum(ranks) < 32

    def test_the_optimizers_moments_of_what_is_masked_are_zero(self, tmp_path: Path):
        found = []

        class Moments(TrainerCallback):
            def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
                if state.global_step + 1 == 12:
                    for layer in layers_of(model, "default").values():
                        columns = layer.wara_B["default"].level1
                        masked = ~columns.any(0)
                        moments = optimizer.state[columns]
                        found.append((int(masked.sum()), moments["exp_avg"][:, masked], moments["exp_avg_sq"]))

        trainer(adapted(), tmp_path, RankSchedule(BUDGET, warmup=8, final=10, interval=4), Moments()).train()
        assert sum(number for number, _, _ in found) > 3
        assert not any(moment.any() for _, moment, _ in found)
        assert all(square.any() for _, _, square in found)

    @pytest.mark.slow
    @pytest.mark.parametrize("stop", [14, 34])
    def test_resuming_equals_the_run_that_was_not_interrupted(self, tmp_path: Path, stop: int):
        def schedule() -> RankSchedule:
            return RankSchedule(BUDGET, warmup=8, final=10, interval=4)

        whole = adapted()
        trainer(whole, tmp_path / "whole", schedule()).train()

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_save = control.should_training_stop = state.global_step == stop

        # Interrupted: its process is gone, and with it the model, before the end.
        interrupted = trainer(adapted(), tmp_path / "part", schedule(), Stop())
        interrupted.callback_handler.callbacks[-2].on_train_end = lambda *_, **__: None
        interrupted.train()
        checkpoint = tmp_path / "part" / f"checkpoint-{stop}"
        assert (checkpoint / FILE).is_file()
        resumed = adapted()
        trainer(resumed, tmp_path / "part", schedule()).train(resume_from_checkpoint=str(checkpoint))
        expected = dict(whole.named_parameters())
        for name, parameter in resumed.named_parameters():
            assert torch.equal(parameter, expected[name]), name

    @pytest.mark.slow
    def test_resuming_without_the_file_says_where_to_give_it(self, tmp_path: Path):
        run = trainer(adapted(), tmp_path, RankSchedule(BUDGET), save_strategy="steps", save_steps=20)
        run.train()
        moved = tmp_path / "moved.safetensors"
        (tmp_path / "checkpoint-20" / FILE).rename(moved)
        again = trainer(adapted(), tmp_path, RankSchedule(BUDGET))
        with pytest.raises(ValueError, match=r"RankSchedule\(state=...\)"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
        model = adapted()
        trainer(model, tmp_path, RankSchedule(BUDGET, state=moved)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-20")
        )
        assert size_of(model) <= BUDGET

    def test_the_best_checkpoint_is_cut_by_its_own_averages(self, tmp_path: Path):
        model = adapted()
        schedule = RankSchedule(BUDGET, warmup=8, final=10, interval=4)
        steps = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10}
        run = trainer(model, tmp_path, schedule, load_best_model_at_end=True, metric_for_best_model="loss", **steps)
        run.evaluate = lambda *_, **__: {"eval_loss": abs(run.state.global_step - 20.0)}
        run.train()
        assert run.state.best_model_checkpoint.endswith("checkpoint-20")
        assert BUDGET - 14 < size_of(model) <= BUDGET
        best = load_file(tmp_path / "checkpoint-20" / "adapter_model.safetensors")
        rows = best["base_model.model.first.wara_A.level1"]
        for row in layers_of(model, "default")["first"].wara_A["default"].level1:
            assert any(torch.equal(row, other) for other in rows)


class TestOwnLoop:
    def test_it_is_what_trainer_does(self):
        model = adapted()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = RankSchedule(like=LoraConfig(r=3), warmup=4, final=0.25, interval=2)
        schedule.start(model, 20)
        for _ in range(20):
            batch = {key: torch.stack([row[key] for row in data(8)]) for key in ("x", "labels")}
            model(**batch)["loss"].backward()
            schedule.before_step()
            optimizer.step()
            schedule.after_step(optimizer)
            optimizer.zero_grad()
        schedule.finish()
        budget = 3 * (12 + 16 + 16 + 4)
        assert budget - 10 < size_of(model) <= budget
        with pytest.raises(RuntimeError, match="has not been started"):
            schedule.before_step()

    def test_a_module_that_the_loss_does_not_reach_loses_its_adapter(self):
        model = adapted()
        first, second = model.base_model.model.first, model.base_model.model.second
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = RankSchedule(10 * 14 + 9, interval=5)
        schedule.start(model, 40)
        for _ in range(40):
            first(torch.randn(8, 12)).square().mean().backward()
            schedule.before_step()
            optimizer.step()
            schedule.after_step(optimizer)
            optimizer.zero_grad()
        schedule.finish()
        assert first.total_rank("default") == 10
        assert type(model.base_model.model.second) is nn.Linear and not second.wara_A


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "either `budget` or `like`"),
            ({"budget": 100, "like": LoraConfig(r=1)}, "either `budget` or `like`"),
            ({"budget": 100, "warmup": 1.0}, "warmup=1.0 must be"),
            ({"budget": 100, "final": -1}, "final=-1 must be"),
            ({"budget": 100, "interval": 0}, "interval=0 must be"),
            ({"budget": 100, "beta1": 1.0}, "beta1=1.0 must be"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RankSchedule(**arguments)

    @pytest.mark.parametrize(
        ("schedule", "fields", "message"),
        [
            (RankSchedule(9), {}, "budget=9 is less than one component, the cheapest of which has 10"),
            (RankSchedule(SIZE), {}, "budget=384 is not less than the 384 parameters"),
            (RankSchedule(BUDGET, warmup=10, final=30), {}, "longer than the training, of 40"),
            (RankSchedule(BUDGET), {"form": "shared"}, "form='shared'"),
            (RankSchedule(BUDGET, adapter_name="other"), {}, "no adapter 'other'"),
        ],
    )
    def test_start_leaves_the_model_as_it_was(self, schedule, fields, message):
        model = adapted(**fields)
        before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            schedule.start(model, 40)
        for name, value in model.named_parameters():
            assert torch.equal(value, before[name][0]) and value.requires_grad == before[name][1]

    def test_a_state_of_another_adapter(self, tmp_path: Path):
        first, second = RankSchedule(BUDGET), RankSchedule(50)
        first.start(adapted(), 40)
        first.save(tmp_path / FILE)
        second.start(adapted(r=2), 40)
        with pytest.raises(ValueError, match="other modules or ranks"):
            second.load(tmp_path / FILE)
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
