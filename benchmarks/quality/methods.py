"""The methods by name, each of them made to a budget: the parameters of a LoRA, which a method may not exceed.

A method is more than a config: it builds what is trained from a `Problem`, and so may look at data before training,
ask to be called after each step, or put other modules into the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from peft import (
    AdaLoraConfig,
    EvaConfig,
    FourierFTConfig,
    GraloraConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    WaveFTConfig,
)

from quality import ranks
from quality.attention import with_linformer, with_low_rank_attention
from quality.sizes import adapted, adapter_size, largest_size, wara_ladder
from quality.tasks.task import Task
from quality.training import Built, Problem, trained_parameters
from wara_peft import WaRAConfig


class Method(Protocol):
    """What the runner asks of a method.

    Attributes:
        name: in tables and results.
        group: "WaRA", "peer", "attention", "end", "ranks" for those that spread a budget over modules, or "rule" for
            those that are run at LoRA's rate alone, "later" for peers that came after the selection.
        sized: whether it is made to a budget.
    """

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def sized(self) -> bool: ...

    def applies(self, task: Task) -> bool:
        """Whether the task's model has the layers that it takes."""

    def build(self, problem: Problem, budget: float) -> Built | None:
        """Make what is trained, with at most the budget's parameters; None where its smallest has more."""


@dataclass(frozen=True)
class Adapter:
    """A method of PEFT, by its config at a size.

    Attributes:
        config: makes it; a rank, a number of frequencies or of steps on a ladder of ranks.
        layers: kinds of layers that it takes.
        needs_grid: whether it needs tokens on a grid.
        prepare: called with the adapted model, the problem and the size; may return what to do after each step.
    """

    name: str
    group: str
    config: Callable[[int, Problem], PeftConfig]
    layers: tuple[str, ...] = ("linear",)
    needs_grid: bool = False
    prepare: Callable[[PeftModel, Problem, int], Callable[[int], object] | None] | None = None
    counted: Callable[[int], PeftConfig] | None = None
    sized = True

    def applies(self, task: Task) -> bool:
        return task.layers in self.layers and (task.has_grid or not self.needs_grid)

    def build(self, problem: Problem, budget: float) -> Built | None:
        def size_of(size: int) -> int:
            return adapter_size(problem, self.counted(size) if self.counted else self.config(size, problem))

        size = largest_size(self.name, size_of, problem, budget)
        if size == 0:
            return None
        parameters = size_of(size)
        model = adapted(problem, self.config(size, problem))
        after_step = self.prepare(model, problem, size) if self.prepare else None
        return Built(model, parameters, *([after_step] if after_step else []))


def wara(
    name: str, levels: int = 1, wavelet: str = "haar", group: str = "WaRA", scaling: float | None = None, **fields: Any
) -> Adapter:
    """`subband` and `grid` with a pair for each subband; `scaling` in place of 1."""
    form = fields.get("form", "subband")

    def config(size: int, problem: Problem) -> PeftConfig:
        by_subband = wara_ladder(levels, size)
        alpha = scaling and scaling * sum(by_subband.values())
        grid = grid_fields(form, problem)
        return WaRAConfig(levels=levels, wavelet=wavelet, subband_ranks=by_subband, wara_alpha=alpha, **fields, **grid)

    layers = ("linear", "conv") if form == "subband" else ("linear",)
    return Adapter(name, group, config, layers, needs_grid=form == "grid")


def wara_of_rank(name: str, form: str, layers: tuple[str, ...] = ("linear",), **fields: Any) -> Adapter:
    """Forms whose size is `r`."""

    def config(size: int, problem: Problem) -> PeftConfig:
        return WaRAConfig(r=size, form=form, **fields, **grid_fields(form, problem))

    return Adapter(name, "WaRA", config, layers, needs_grid=form == "grid")


def grid_fields(form: str, problem: Problem) -> dict[str, Any]:
    """Where the tokens lie, for models that do not say it."""
    return problem.grid if form == "grid" else {}


def lora(name: str, layers: tuple[str, ...] = ("linear", "conv"), **fields: Any) -> Adapter:
    return Adapter(name, "peer", lambda size, _: LoraConfig(r=size, lora_alpha=size, **fields), layers)


def eva() -> Adapter:
    def config(size: int, _: Problem) -> PeftConfig:
        # rho=1 keeps the rank of each layer: the first values are what is compared here.
        return LoraConfig(r=size, lora_alpha=size, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))

    def prepare(model: PeftModel, problem: Problem, size: int) -> None:
        ranks.initialize_eva(model, problem)

    return Adapter("LoRA, EVA", "peer", config, prepare=prepare, counted=lambda size: LoraConfig(r=size))


def adalora() -> Adapter:
    def config(size: int, problem: Problem) -> PeftConfig:
        first = size + max(1, size // 2)
        return AdaLoraConfig(
            init_r=first,
            target_r=size,
            lora_alpha=first,
            tinit=problem.steps // 10,
            tfinal=problem.steps // 3,
            deltaT=1,
            total_step=problem.steps,
        )

    def prepare(model: PeftModel, problem: Problem, size: int) -> Callable[[int], object]:
        return model.base_model.update_and_allocate

    def counted(size: int) -> PeftConfig:
        return AdaLoraConfig(init_r=size, target_r=size, total_step=10)

    return Adapter("AdaLoRA", "peer", config, prepare=prepare, counted=counted)


def gralora() -> Adapter:
    """Two by two blocks, each of half of the rank: with LoRA's parameters twice its rank, as `subband` has."""

    def config(size: int, _: Problem) -> PeftConfig:
        return GraloraConfig(r=2 * size, alpha=2 * size, gralora_k=2)

    return Adapter("GraLoRA", "later", config)


def spectral(name: str, kind: type[PeftConfig], field: str) -> Adapter:
    """Methods whose size is one number of a config."""
    return Adapter(name, "peer", lambda size, _: kind(**{field: size}))


@dataclass(frozen=True)
class Attention:
    """The model's attention replaced by a module of `wara_peft.attention`, made from its weights."""

    name: str
    replace: Callable[[Problem, Any, int], Any]
    """Puts attention of a size into a model, and lets it and the head train."""
    group = "attention"
    sized = True

    def applies(self, task: Task) -> bool:
        return task.attention == "vit"

    def build(self, problem: Problem, budget: float) -> Built | None:
        def size_of(size: int) -> int:
            try:
                model = self.replace(problem, copy.deepcopy(problem.model), size)
            except ValueError:  # more than the width or the length has
                return 2**62
            return trained_parameters(model, problem.head)

        size = largest_size(self.name, size_of, problem, budget)
        if size == 0:
            return None
        model = self.replace(problem, problem.model, size)
        return Built(model, trained_parameters(model, problem.head))


@dataclass(frozen=True)
class End:
    """Where the scale ends: all weights, or none but the head's."""

    name: str
    whole: bool
    group = "end"
    sized = False

    def applies(self, task: Task) -> bool:
        return True

    def build(self, problem: Problem, budget: float) -> Built:
        problem.model.requires_grad_(self.whole)
        for name in problem.head:
            problem.model.get_submodule(name).requires_grad_(True)
        return Built(problem.model, trained_parameters(problem.model, problem.head))


LORA = "LoRA"
"""What the others are compared with."""
DEFAULT = "WaRA subband, haar, 1"
"""What a `WaRAConfig` without arguments is."""
BOTH = ("linear", "conv")
RULES = {
    "WaRA subband, haar, 1": "WaRA subband, haar, 1, scaled by 1/0.7",
    "WaRA subband, haar, 3": "WaRA subband, haar, 3, scaled by 1/0.5",
}
"""Methods, and what each is called with the scaling that makes its first step as long as LoRA's."""

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        lora(LORA),
        lora("rsLoRA", use_rslora=True),
        lora("DoRA", use_dora=True),
        lora("LoRA, PiSSA", ("linear",), init_lora_weights="pissa"),
        eva(),
        adalora(),
        spectral("MiSS", MissConfig, "r"),
        gralora(),
        spectral("VeRA", VeraConfig, "r"),
        spectral("WaveFT", WaveFTConfig, "n_frequency"),
        spectral("FourierFT", FourierFTConfig, "n_frequency"),
        wara("WaRA subband, haar, 1"),
        wara("WaRA subband, haar, 3", levels=3),
        wara("WaRA subband, db4, 1", wavelet="db4"),
        wara("WaRA subband, db4, 3", levels=3, wavelet="db4"),
        wara_of_rank("WaRA shared", "shared", BOTH),
        wara("WaRA grid", form="grid"),
        wara_of_rank("WaRA grid, gains", "grid", grid_pairs="shared"),
        wara_of_rank("WaRA tiny", "tiny"),
        # Adam's first step moves a pair of level j by 2^(-j/2) of what it moves LoRA's.
        wara(RULES["WaRA subband, haar, 1"], group="rule", scaling=1 / 0.7),
        wara(RULES["WaRA subband, haar, 3"], levels=3, group="rule", scaling=1 / 0.5),
        Attention("low-rank attention", with_low_rank_attention),
        Attention("Linformer", with_linformer),
        *ranks.METHODS,
        End("full fine-tuning", whole=True),
        End("frozen", whole=False),
    )
}
