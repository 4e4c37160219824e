"""`RankSchedule` starts training with a large adapter, and cuts it down to a budget of parameters while it trains."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..arguments import check_argument, check_whole_number
from ..layers.base import WaRALayer
from ..layers.lookup import layers_of
from ..linear_algebra.tails import moments_of
from ..training.components import config_of, keep_components, parameters_of_component, subband_of
from .budget import CubicBudget, lora_parameters_in
from .greedy import units_that_fit
from .sensitivity import Sensitivity

FILE = "rank_schedule.safetensors"
"""Name of the file that lies beside a checkpoint's weights, and holds the schedule's averages and choice."""


class RankSchedule(TrainerCallback):
    """Cuts an adapter down to a budget of parameters in the course of a training, by AdaLoRA's rule.

    A component is a row of A_s with its column of B_s; it has n_j + m_j parameters. Its score is the mean smoothed
    sensitivity of the row's numbers plus that of the column's numbers (see `Sensitivity`). Means make the score
    independent of the component's length. The components with the highest scores are kept, within a budget that falls
    as (1 − progress)³ from the adapter's size to `budget`.

    The other components are masked: their column of B_s and its optimizer moments become zero. Their row of A_s stays,
    so a masked component grows again from zero, and may be kept at the next choice. In the last `final` steps the
    choice is fixed. At the end of the training masked components are cut out. Only then do shapes change, in memory,
    in checkpoints and in exports.

    Use it as a callback of transformers' `Trainer`:

        >>> Trainer(model, args, callbacks=[RankSchedule(like=LoraConfig(r=8))], ...)  # doctest: +SKIP

    Each checkpoint gets a file with the averages, so that a resumed training continues exactly. With
    `load_best_model_at_end` the schedule goes back to the best checkpoint's averages too, and makes the final choice
    from them if it was not yet fixed there. Or call it in your own loop:

        >>> schedule = RankSchedule(budget=100_000)  # doctest: +SKIP
        >>> schedule.start(model, total_steps)  # doctest: +SKIP
        >>> for batch in batches:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     schedule.before_step()
        ...     optimizer.step()
        ...     schedule.after_step(optimizer)
        ...     optimizer.zero_grad()
        >>> schedule.finish()  # doctest: +SKIP

    Under data parallelism (DDP) all processes have the same gradients, and so make the same choices. Sharded
    parameters (FSDP, DeepSpeed's stage 3) are not supported.

    Args:
        budget: how many parameters the adapter may have in the end.
        like: a LoRA whose number of parameters is the budget. If it has no `target_modules`, they are counted on the
            adapter's modules.
        warmup: an int, the number of steps before the first choice; or a float, their share of all steps.
        final: an int, the number of steps at the end in which the choice is fixed; or a float, their share.
        interval: steps between two choices.
        beta1, beta2: the decay rates of `Sensitivity`'s moving averages.
        adapter_name: name of the adapter, which must have `form="subband"`.
        state: a file `rank_schedule.safetensors` to resume from; None looks for it in Trainer's checkpoint.

    Raises:
        ValueError: neither or both of `budget` and `like` are given, or a number is out of range. `start` refuses a
            budget below the cheapest component or not below the adapter's size, another form, sharded parameters, and
            a schedule longer than the training; `before_step` refuses a step without gradients.

    Source: AdaLoRA, arXiv 2303.10512; it counts its budget in ranks, and this class counts parameters.
    """

    def __init__(
        self,
        budget: int | None = None,
        *,
        like: LoraConfig | None = None,
        warmup: int | float = 0.1,
        final: int | float = 0.3,
        interval: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        adapter_name: str = "default",
        state: str | os.PathLike[str] | None = None,
    ) -> None:
        if budget is not None:
            check_argument("RankSchedule(budget) or RankSchedule(like=...)", "budget", budget, "an int")
        if (budget is None) == (like is None):
            raise ValueError("Give either `budget` or `like`.")
        for name, value in (("warmup", warmup), ("final", final)):
            if value < 0 or (isinstance(value, float) and value >= 1):
                raise ValueError(f"{name}={value!r} must be steps, an int, or their share, a float less than 1.")
        check_whole_number("interval", interval)
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < value < 1:
                raise ValueError(f"{name}={value!r} must be between 0 and 1.")
        self.budget, self.like = budget, like
        self.warmup, self.final, self.interval = warmup, final, interval
        self.beta1, self.beta2 = beta1, beta2
        self.adapter_name = adapter_name
        self.state_file = None if state is None else Path(state)
        self._running: _Running | None = None

    def start(self, model: nn.Module, total_steps: int) -> None:
        """Begin the schedule; the adapter does not change yet.

        Args:
            model: the model with the adapter.
            total_steps: optimizer steps of the whole training.
        """
        # Called for its checks: the adapter must exist, and must be one whose components can be told apart.
        config_of(model, self.adapter_name)
        layers = layers_of(model, self.adapter_name)
        running = _Running(model, self.adapter_name, layers, self.beta1, self.beta2)
        size, cheapest = sum(running.costs), min(running.costs)
        budget = self.budget
        if self.like is not None:
            bases = {name: layer.get_base_layer() for name, layer in layers.items()}
            budget = lora_parameters_in(model, self.like, bases)
        assert budget is not None
        if budget < cheapest:
            raise ValueError(
                f"budget={budget:,} is less than one component, the cheapest of which has {cheapest:,} parameters."
            )
        if budget >= size:
            raise ValueError(
                f"budget={budget:,} is not less than the {size:,} parameters that adapter {self.adapter_name!r} has: "
                "there is nothing to cut. Start from more, with a larger `r`."
            )
        warmup, final = (
            round(value * total_steps) if isinstance(value, float) else value for value in (self.warmup, self.final)
        )
        if warmup + final >= total_steps:
            raise ValueError(
                f"A schedule of warmup={warmup} and final={final} steps is longer than the training, of {total_steps}."
            )
        running.budget = CubicBudget(size, budget, total_steps, warmup, final)
        self._running = running

    @property
    def running(self) -> _Running:
        if self._running is None:
            raise RuntimeError("The schedule has not been started. Call `start(model, total_steps)` first.")
        return self._running

    def before_step(self) -> None:
        """Update the sensitivities from the gradients; call it after `backward` and before the optimizer's step."""
        if not self.running.fixed:
            self.running.sensitivity.update()

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Choose and mask components if a choice is due; call it after the optimizer's step.

        Args:
            optimizer: the optimizer, whose moments become zero where a column of B_s is masked; without it they stay.
        """
        running = self.running
        running.step += 1
        budget = running.budget
        if running.fixed:
            # The optimizer moves masked columns away from zero at every step.
            running.mask()
        elif running.step >= budget.end:
            running.choose(budget.last, optimizer)
            running.fixed = True
        elif running.step > budget.warmup and running.step % self.interval == 0:
            running.choose(budget.at(running.step), optimizer)

    def finish(self) -> None:
        """Cut the masked components out of the adapter, and end the schedule."""
        running = self.running
        if not running.fixed:  # the training ended early, or went back to an early checkpoint
            running.choose(running.budget.last, None)
        self._running = None
        keep_components(running.model, self.adapter_name, running.kept_components())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the averages, the choice and the progress into a safetensors file."""
        temporary = Path(f"{os.fspath(path)}.tmp")
        # A process that is killed while it writes must leave no half of a file under the final name.
        save_file(self.running.tensors(), temporary)
        temporary.replace(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a file that `save` wrote; call it after `start`.

        Raises:
            ValueError: the file was written for an adapter with other modules or ranks.
        """
        self.running.load(load_file(path), path)

    # Trainer calls the methods below by these names. Gradients are already clipped at `on_pre_optimizer_step`, and are
    # still there at `on_optimizer_step`.

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.start(model, state.max_steps)
        if state.global_step:
            path = self.state_file or Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", FILE)
            if not path.is_file():
                self._running = None
                raise ValueError(
                    f"To resume at step {state.global_step} the schedule needs {path}, which is not there. Give its "
                    "place as `RankSchedule(state=...)`, or begin the training anew."
                )
            self.load(path)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.after_step(optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # One process writes for all, whose choices are equal.
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if args.should_save and folder.is_dir():
            self.save(folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer has already put the best checkpoint's weights into the model, so the averages must go back as well.
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(Path(state.best_model_checkpoint, FILE))
        self.finish()


class _Running:
    """The state of a schedule between `start` and `finish`, for the components of one adapter.

    Lists of components are in the order of modules, levels and rows.

    Attributes:
        step: number of optimizer steps so far.
        kept: for each module and level a list that says whether each component is kept.
        fixed: whether the choice is final.
        costs: the number of parameters of every component.
    """

    budget: CubicBudget

    def __init__(
        self, model: nn.Module, adapter_name: str, layers: Mapping[str, WaRALayer], beta1: float, beta2: float
    ) -> None:
        self.model = model
        self.layers = layers
        self.adapter_name = adapter_name
        self.step = 0
        self.fixed = False
        parameters: dict[str, Tensor] = {}
        self.kept: dict[tuple[str, int], list[bool]] = {}
        self.costs: list[int] = []
        for name, layer in layers.items():
            rows, columns = layer.factors(adapter_name)
            if any(
                isinstance(value, DTensor) or value.ndim < 2 for value in (*rows.parameters(), *columns.parameters())
            ):
                raise ValueError(
                    f"The adapter of module {name!r} is sharded, as by FSDP or DeepSpeed's stage 3, and a process "
                    "sees a part of its components. Train with DDP, or find ranks before it with `allocate_ranks`."
                )
            for level, bands in enumerate(rows.axis.bands):
                if bands:
                    self.kept[name, level] = [True] * len(bands)
                    self.costs += [parameters_of_component(layer, adapter_name, level)] * len(bands)
                    parameters[_key(name, "A", level)] = rows.get_parameter(f"level{level}")
                    parameters[_key(name, "B", level)] = columns.get_parameter(f"level{level}")
        self.sensitivity = Sensitivity(parameters, beta1, beta2)

    def scores(self) -> list[float]:
        """Give every component's score: the mean over its row of A_s plus the mean over its column of B_s."""
        found = []
        for name, level in self.kept:
            rows = self.sensitivity.score(_key(name, "A", level)).flatten(1).mean(1)
            columns = self.sensitivity.score(_key(name, "B", level)).mean(0)
            found += (rows + columns).tolist()
        return found

    def choose(self, budget: int, optimizer: torch.optim.Optimizer | None) -> None:
        chosen = iter(units_that_fit(self.scores(), self.costs, budget))
        self.kept = {key: [next(chosen) for _ in kept] for key, kept in self.kept.items()}
        self.mask()
        for columns, masked in self._masked():
            for moment in moments_of(optimizer, columns):
                moment[:, masked] = 0

    def _masked(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give each parameter of B with a mask, one value a column, that is true for the columns to set to zero."""
        for (name, level), kept in self.kept.items():
            columns = self.sensitivity.parameters[_key(name, "B", level)]
            yield columns, ~torch.tensor(kept, device=columns.device)

    @torch.no_grad()
    def mask(self) -> None:
        for columns, masked in self._masked():
            columns[:, masked] = 0

    def kept_components(self) -> dict[str, dict[str, list[int]]]:
        found: dict[str, dict[str, list[int]]] = {}
        for (name, level), kept in self.kept.items():
            rows, _ = self.layers[name].factors(self.adapter_name)
            for index in (index for index, keep in enumerate(kept) if keep):
                band, own = subband_of(rows, index, level)
                found.setdefault(name, {}).setdefault(band, []).append(own)
        return found

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"kept.{name}.level{level}": torch.tensor(flags) for (name, level), flags in self.kept.items()}
        averages = {f"average.{key}": value for key, value in self.sensitivity.average.items()}
        deviations = {f"deviation.{key}": value for key, value in self.sensitivity.deviation.items()}
        progress = torch.tensor([self.step, int(self.fixed)])
        return {"progress": progress, **kept, **averages, **deviations}

    def load(self, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
        own = self.tensors()
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in tensors.items()}:
            raise ValueError(f"{os.fspath(path)} is of an adapter with other modules or ranks than this one has.")
        self.step, self.fixed = int(tensors["progress"][0]), bool(tensors["progress"][1])
        self.kept = {(name, level): tensors[f"kept.{name}.level{level}"].tolist() for name, level in self.kept}
        for key, value in self.sensitivity.average.items():
            value.copy_(tensors[f"average.{key}"])
            self.sensitivity.deviation[key].copy_(tensors[f"deviation.{key}"])


def _key(module_name: str, side: str, level: int) -> str:
    return f"{module_name}.{side}.level{level}"
