"""Training that keeps weights close to low rank, so that factorising them at the end loses little."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...arguments import check_argument, short_form
from ...calibration.processes import take_from_first_process
from ...factorized.key_names import write_names_of_modules
from ...factorized.low_rank_conv import CONVOLUTIONS, factorize_conv
from ..compress import compress
from ..methods import SVD, Method
from ..replacement import count_parameters, replace_everywhere
from ..report import CompressionReport, LayerReport
from ..statistics.layer_statistics import LayerStatistics
from ..targets import check_base, factorizable_weight, layer_targets, reasons_of, separate_replaceable
from .callback import TrainingMethod


class TrainedRankPruning(TrainingMethod):
    """Truncates weights to low rank every few steps of a training, and shrinks their singular values.

    Every m-th step has two additions. Before its forward, each weight W = U Σ Vᵀ is overwritten by its truncation
    W' = U_k Σ_k V_kᵀ, with the smallest k for which Σ_{i≤k} σ_i² ≥ e E. The weight of a convolution is taken as a
    matrix, (outputs, inputs · kernel). After the backward, λ U_k V_kᵀ, a sub-gradient of the nuclear norm, is added to
    the weight's gradient. Other steps are unchanged, and weights stay dense. At the end `finish` factorises the layers
    at the ranks that they have reached.

    E is a reference energy, ‖W‖²_F at first. If E were ‖W‖²_F each time, each truncation would take a share of what
    the last one left, and the rank would fall without any gradient. So E stays while ‖W‖²_F does not exceed it, and
    falls only if the weight itself has become smaller since its last truncation W':
    E_t = max(‖W_t‖², E_{t−1} min(1, ‖W_t‖² / ‖W'_{t−1}‖²)). Without a gradient, or with only weight decay, k stays.

    After Xu et al., "Trained Rank Pruning", IJCAI 2020 (arXiv 1812.02402, 2004.14566), where E is ‖W‖² each time.

    Use it as a callback of transformers' `Trainer`, whose checkpoints keep E:

        >>> Trainer(model, args, callbacks=[TrainedRankPruning()], ...)  # doctest: +SKIP

    Or use it in a training loop:

        >>> pruning = TrainedRankPruning()  # doctest: +SKIP
        >>> pruning.start(model)  # doctest: +SKIP
        >>> for step, batch in enumerate(batches):  # doctest: +SKIP
        ...     pruning.before_forward(step)
        ...     model(**batch).loss.backward()
        ...     pruning.after_backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> report = pruning.finish()  # doctest: +SKIP

    Args:
        energy: e.
        penalty: λ.
        period: m. The published script has 1 by default and runs with 5.
        target_modules: as in PEFT: a list of names or ends of names, or a regex for the full name; None means all
            linear layers but the output layer or classifier of a model of transformers, and all convolutions but the
            first one and those with groups or a kernel of size one.

    Attributes:
        report: the result of `finish`, which `Trainer.train` calls at its end.

    Raises:
        ValueError: a number is out of range. `start` refuses targets that match nothing or cannot be factorised,
            sharded weights, and a model with adapters. Truncation refuses weights that are not finite.
    """

    adds_to_gradients = True
    resumed = ("_references",)

    def __init__(
        self,
        energy: float = 0.9,
        penalty: float = 3e-4,
        period: int = 5,
        target_modules: str | list[str] | None = None,
    ) -> None:
        for name, value in (("energy", energy), ("penalty", penalty), ("period", period)):
            check_argument("TrainedRankPruning(energy, penalty, period)", name, value, "a number")
        if not 0 < energy <= 1:
            raise ValueError(f"energy={energy!r} must be more than 0 and at most 1.")
        if penalty < 0:
            raise ValueError(f"penalty={penalty!r} must be at least 0.")
        if period < 1:
            raise ValueError(f"period={period!r} must be at least 1.")
        self.energy, self.penalty, self.period = energy, penalty, period
        self.target_modules = target_modules
        self.report: CompressionReport | None = None
        self._targets: dict[str, nn.Module] = {}
        self._references: dict[str, list[float]] = {}
        """Maps names to E and ‖W'‖² of the last truncation."""
        self._directions: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        """Begin to train a model."""
        check_base(model)
        found = layer_targets(model, self.target_modules)
        if self.target_modules is None:
            convolutions = [name for name, layer in found.items() if isinstance(layer, CONVOLUTIONS)]
            skipped = convolutions[:1] + [name for name in convolutions if set(_kernel(found[name])) == {1}]
            found = {name: layer for name, layer in found.items() if name not in skipped}
        targets, left = separate_replaceable(model, found)
        for name, layer in targets.items():
            if isinstance(layer.get_parameter("weight"), DTensor):
                raise ValueError(f"{name!r} is sharded, as by FSDP, and has no SVD in parts. Train with DDP.")
            factorizable_weight(name, layer)
        if not targets:
            raise ValueError(f"There is no layer to prune. {reasons_of(left) or 'All targets are kept out'}.")
        # The weights stay dense until the end. A training that resumes must find them by their names, too.
        write_names_of_modules(model)
        self._model, self._targets = model, targets
        self._references, self._directions = {}, {}

    def before_forward(self, step: int) -> None:
        """Truncate all weights if `step`, counted from 0, is a multiple of `period`."""
        self._directions = {}
        if step % self.period == 0:
            self._truncate()

    @torch.no_grad()
    def _truncate(self) -> dict[str, int]:
        self._started()
        for name, layer in self._targets.items():
            if not bool(layer.get_parameter("weight").isfinite().all()):
                raise ValueError(
                    f"{name!r} cannot be truncated: training has brought NaN or infinity into its weight. Begin again "
                    "from an earlier checkpoint with a lower learning rate."
                )
        ranks = {}
        for name, layer in self._targets.items():
            weight = layer.get_parameter("weight")
            matrix = _unfolded(layer)
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            energies = values.double().square().cumsum(0)
            total = float(energies[-1])
            reference, kept = self._references.get(name, [total, total])
            reference = max(total, reference * min(1.0, total / kept if kept > 0 else 1.0))
            # Rounding of the weight to its dtype takes away a little energy, which must not raise the rank.
            least = self.energy * reference * (1 - 4 * torch.finfo(weight.dtype).eps)
            rank = min(int((energies < least).sum()) + 1, len(values))
            truncated = ((left[:, :rank] * values[:rank]) @ right[:rank]).view_as(weight)
            direction = (left[:, :rank] @ right[:rank]).view_as(weight)
            # Rounding may differ between machines, and then so would weights that DDP takes to be equal.
            take_from_first_process((truncated, direction))
            if rank < len(values):
                weight.copy_(truncated)
            self._references[name] = [reference, float(energies[rank - 1])]
            self._directions[name] = direction.to(weight.dtype)
            ranks[name] = rank
        return ranks

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add λ U_k V_kᵀ to gradients in a step that has truncated weights.

        Call it after backward (and clipping), before the optimizer's step.
        """
        for name, direction in self._directions.items():
            weight = self._targets[name].get_parameter("weight")
            if weight.grad is not None:
                weight.grad.add_(direction, alpha=self.penalty)
        self._directions = {}

    def finish(
        self, method: type[Method] = SVD, statistics: Mapping[str, LayerStatistics] | None = None
    ) -> CompressionReport:
        """Truncate for the last time, and factorise each layer at its rank, where that saves parameters.

        Args:
            method: class of the method of `compress` that factorises linear layers.
            statistics: as in `compress`, for linear layers. Measure statistics with the trained model.

        Returns:
            A report of what each layer got, which `model.compression_report` keeps too.

        Raises:
            TypeError: `method` is no class of a method. No weight is truncated then.
        """
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise TypeError(
                "finish(method, statistics): method must be the class of a method, as Activation, and is "
                f"{short_form(method)}."
            )
        model, targets = self._started(), self._targets
        ranks = self._truncate()
        made: dict[nn.Module, nn.Module] = {}
        entries = []
        for name, layer in targets.items():
            if isinstance(layer, CONVOLUTIONS):
                new = factorize_conv(layer, ranks[name])
                dense, after = count_parameters(layer), count_parameters(new)
                pays = after < dense
                if pays:
                    made[layer] = new
                rows, columns = _unfolded(layer).shape
                entries.append(
                    LayerReport(name, (rows, columns), ranks[name] if pays else None, None, dense,
                                after if pays else dense, 0.0, "" if pays else "no rank pays")
                )  # fmt: skip
        report = CompressionReport(method.solver, "given", 0, "parameters", 0, 0, [], {})
        linear = {name: rank for name, rank in ranks.items() if not isinstance(targets[name], CONVOLUTIONS)}
        if linear:
            report = compress(model, method(linear), statistics, show_progress_bar=False)
        replace_everywhere(model, made)
        spent = report.spent + sum(entry.parameters_after for entry in entries)
        before = report.before + sum(entry.parameters_before for entry in entries)
        report = dataclasses.replace(
            report, layers=[*report.layers, *entries], spent=spent, budget=spent, before=before
        )
        self.report = report
        model.compression_report = report  # type: ignore[assignment]
        self._model, self._directions = None, {}
        return report

    def arguments(self) -> dict[str, Any]:
        names = ("energy", "penalty", "period", "target_modules")
        return {name: getattr(self, name) for name in names}


def _unfolded(layer: nn.Module) -> Tensor:
    """Give the weight as a matrix, (m, n) or for a convolution (m, n · kernel), in float32 or better."""
    weight = layer.get_parameter("weight").detach()
    return weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def _kernel(layer: nn.Module) -> tuple[int, ...]:
    assert isinstance(layer, CONVOLUTIONS)
    kernel: tuple[int, ...] = layer.kernel_size
    return kernel
