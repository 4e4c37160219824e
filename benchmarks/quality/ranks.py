"""Ways to spread a budget over modules: `allocate_ranks`, those that PEFT has, and controls that spread it badly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn

from quality.sizes import adapted, adapter_size, largest_size, wara_ladder
from quality.tasks.task import Task
from quality.training import Built, Problem, trained_parameters
from wara_peft import RankSchedule, WaRAConfig, allocate_ranks

BATCHES = 8
"""From which gradients or inputs are taken."""
LORA_ALONE = {"aa0": 1, "aa1": 0, "ad1": 0, "da1": 0, "dd1": 0}
"""Ranks of a WaRA that is a LoRA."""
FIRST_LAYER = re.compile(r"(^|\.)layers?\.0\.")


@dataclass(frozen=True)
class OfRanks:
    """What these methods share: linear layers alone, and the stage that compares them."""

    name: str
    group = "ranks"
    sized = True

    def applies(self, task: Task) -> bool:
        return task.layers == "linear"


def parameters_of(problem: Problem, budget: float) -> int:
    """The budget in parameters: so many times those of LoRA with rank 1."""
    return int(budget * adapter_size(problem, LoraConfig(r=1)))


@dataclass(frozen=True)
class Allocated(OfRanks):
    """A method whose config comes from the model and data: from a problem, and the parameters that it may have."""

    config: Callable[[Problem, int], PeftConfig]

    def build(self, problem: Problem, budget: float) -> Built:
        config = self.config(problem, parameters_of(problem, budget))
        config.modules_to_save = problem.head or None
        model = get_peft_model(problem.model, config)
        return Built(model, trained_parameters(model, problem.head))


@dataclass(frozen=True)
class EvaRanks(OfRanks):
    """LoRA whose ranks and first values EVA takes from the inputs; it counts ranks, and not parameters."""

    def build(self, problem: Problem, budget: float) -> Built | None:
        size = largest_size(self.name, lambda size: adapter_size(problem, LoraConfig(r=size)), problem, budget)
        if size == 0:
            return None
        config = LoraConfig(r=size, lora_alpha=size, init_lora_weights="eva", eva_config=EvaConfig())
        model = adapted(problem, config)
        initialize_eva(model, problem)
        return Built(model, trained_parameters(model, problem.head))


@dataclass(frozen=True)
class Scheduled(OfRanks):
    """An adapter that `RankSchedule` brings down to the budget from half as much again, as AdaLoRA does here."""

    config: Callable[[int], WaRAConfig]
    """Makes it, of a size that costs what a LoRA of that rank does."""

    def build(self, problem: Problem, budget: float) -> Built:
        parameters = parameters_of(problem, budget)
        model = adapted(problem, self.config(int(budget) + max(1, int(budget) // 2)))
        schedule = RankSchedule(parameters, warmup=0.1, final=0.33, interval=5)
        schedule.start(model, problem.steps)

        def after_step(step: int) -> None:
            schedule.before_step()
            schedule.after_step()

        return Built(model, parameters, after_step)


def initialize_eva(model: nn.Module, problem: Problem) -> None:
    """Give a LoRA of PEFT the values, and the ranks, that EVA finds in the first batches."""
    text = "attention_mask" in problem.splits["train"]
    options: dict[str, Any] = {} if text else {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": flat_inputs}
    # PEFT would take labels of texts for those of tokens.
    left_out = {"labels"} if text else set()
    inputs = [{name: batch[name] for name in batch.keys() - left_out} for batch in first_batches(problem)]
    initialize_lora_eva_weights(model, inputs, show_progress_bar=False, **options)


def flat_inputs(inputs: Any, model_input: Any, name: str) -> Any:
    """(tokens of all rows, n), where no row has padding."""
    states = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
    return states.reshape(-1, states.shape[-1])


def first_batches(problem: Problem) -> list[Any]:
    return list(islice(problem.batches(), BATCHES))


def by_gradient(problem: Problem, parameters: int, ranks: dict[str, int]) -> WaRAConfig:
    """What `allocate_ranks` makes of subbands of which each may have a rank."""
    config = WaRAConfig(target_modules=problem.targets, subband_ranks=ranks)
    return allocate_ranks(problem.model, config, first_batches(problem), budget=parameters, batches=BATCHES).config


def lora_by_gradient(problem: Problem, parameters: int) -> WaRAConfig:
    return by_gradient(problem, parameters, LORA_ALONE)


def wara_by_gradient(problem: Problem, parameters: int) -> WaRAConfig:
    return by_gradient(problem, parameters, {"aa1": 1, "ad1": 1, "da1": 1, "dd1": 1})


def wara_over_modules(problem: Problem, parameters: int) -> WaRAConfig:
    """A LoRA's ranks by module, as far as they go evenly into a module's four subbands."""
    config = lora_by_gradient(problem, parameters)
    pattern = config.rank_pattern.items()
    config.rank_pattern = {key: {"aa0": 0, **wara_ladder(1, 2 * ranks["aa0"])} for key, ranks in pattern}
    return config


def lora_of_ranks(ranks: dict[str, int]) -> LoraConfig:
    """LoRA with a rank for each module by its full name, and scaling 1 in all."""
    pattern = {re.escape(name): rank for name, rank in ranks.items() if rank}
    chosen = [name for name, rank in ranks.items() if rank]
    return LoraConfig(target_modules=chosen, rank_pattern=pattern, alpha_pattern=pattern)


def costs(problem: Problem) -> dict[str, int]:
    """Parameters of a pair of LoRA in each target."""
    return {
        name: sum(length or 0 for length in _get_in_out_features(module))
        for name, module in problem.model.named_modules()
        if name.rpartition(".")[2] in problem.targets
    }


def first_layer(problem: Problem, parameters: int) -> LoraConfig:
    """The whole budget in the first of the layers, equal ranks."""
    cost = {name: value for name, value in costs(problem).items() if FIRST_LAYER.search(name)}
    return lora_of_ranks(dict.fromkeys(cost, parameters // sum(cost.values())))


def random_ranks(problem: Problem, parameters: int) -> LoraConfig:
    """Shares drawn from the flat Dirichlet distribution: pairs go to modules in proportion to them while they fit."""
    cost = costs(problem)
    generator = torch.Generator().manual_seed(problem.seed)
    shares = -torch.rand(len(cost), generator=generator).log()
    names = list(cost)
    ranks = dict.fromkeys(cost, 0)
    while parameters >= max(cost.values()):
        name = names[int(torch.multinomial(shares, 1, generator=generator))]
        ranks[name] += 1
        parameters -= cost[name]
    return lora_of_ranks(ranks)


METHODS = (
    Allocated("LoRA, ranks by gradient", lora_by_gradient),
    Allocated("WaRA subband, ranks by gradient over modules", wara_over_modules),
    Allocated("WaRA subband, ranks by gradient", wara_by_gradient),
    Scheduled("LoRA, ranks while training", lambda rank: WaRAConfig(subband_ranks={**LORA_ALONE, "aa0": rank})),
    Scheduled("WaRA subband, ranks while training", lambda rank: WaRAConfig(subband_ranks=wara_ladder(1, 2 * rank))),
    EvaRanks("LoRA, EVA's ranks"),
    Allocated("LoRA, first layer alone", first_layer),
    Allocated("LoRA, random ranks", random_ranks),
)
