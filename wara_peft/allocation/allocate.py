"""`allocate_ranks` takes a model, a config and a few batches, and returns a config whose ranks fit a budget.

It scores the directions of every subband on the batches (`signals`, `blocks`), and then buys units of rank in the
order of score per parameter until the budget is spent (`greedy`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import send_to_device
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from ..arguments import check_argument, check_unwrapped, check_whole_number, short_form
from ..base_layers.kinds import kind_of
from ..base_layers.quantization import keep_unpacked
from ..calibration.batches import LossFunction, groups_within, in_eval_mode, with_frozen_parameters
from ..calibration.processes import take_from_first_process
from ..compiled import on_plain_model
from ..config import WaRAConfig
from ..config_fields.name_patterns import value_for
from ..messages import first_few
from ..model import WaRAModel
from ..wavelet import Subband, subbands
from .blocks import Spectrum, energies_of_gradient, energies_of_inputs
from .budget import lora_parameters_in
from .greedy import Item, spend
from .report import AllocationReport, ModuleAllocation
from .signals import input_covariances, mean_gradients

SCORES = ("gradient", "activation")
MAX_BYTES = 2**31
MAX_RANK = 64

Ranks = int | Mapping[str, int | Mapping[str, int]]
"""One rank for every subband of every module; or a dict whose keys are module names or regular expressions, and whose
values are one rank for all subbands or a dict of ranks by subband."""


class Allocation(NamedTuple):
    """The result of `allocate_ranks`: a config with a rank for each module and subband, and a report on its making."""

    config: WaRAConfig
    report: AllocationReport


@dataclass(frozen=True)
class _Target:
    """A linear layer that is to be adapted.

    Attributes:
        layer: the base layer.
        shape: (m, n), its out features and in features.
        bands: the subbands that may get a rank, by name.
        floors, caps: the least and the largest rank of each of these subbands.
    """

    layer: nn.Module
    shape: tuple[int, int]
    bands: dict[str, Subband]
    floors: dict[str, int]
    caps: dict[str, int]

    def cost(self, name: str) -> int:
        """Count the parameters of one pair of this subband: a row of A_s and a column of B_s."""
        return sum(self.bands[name].shape(*self.shape))


@on_plain_model
def allocate_ranks(
    model: nn.Module,
    config: WaRAConfig,
    dataloader: Iterable[Any],
    *,
    budget: int | None = None,
    like: LoraConfig | None = None,
    loss_fn: LossFunction | None = None,
    batches: int = 8,
    score: Literal["gradient", "activation"] = "gradient",
    min_rank: Ranks = 0,
    max_rank: Ranks = MAX_RANK,
    max_bytes: int = MAX_BYTES,
) -> Allocation:
    """Spread a budget of parameters over the modules and subbands of an adapter, before training.

    A unit of rank is a pair: a row of A_s, (n_j,), and a column of B_s, (m_j,). It costs m_j + n_j parameters. Let G
    be the mean gradient of a weight, and σ_i the singular values of S_out,sᵀ G S_in,s. Then the i-th pair of subband s
    gains σ_i², because a gradient step along the best r pairs lowers the loss in proportion to Σ_{i≤r} σ_i². Pairs are
    taken in the order of gain per parameter for as long as they fit. `config` determines the scaling of every module;
    the allocation does not change it.

    The model runs over the batches in evaluation mode with all parameters frozen, and is left as it was. Equal batches
    give equal ranks. If `torch.distributed` is initialised, each process passes its own batches, gradients are
    averaged, and all processes get the same config.

    Args:
        model: the base model, without adapters.
        config: names the modules and the wavelet. It must have `form="subband"` and target linear layers (also
            quantized ones). A subband to which it gives rank 0 gets no rank. For plain LoRA give a rank only to `aa0`.
        dataloader: gives batches: mappings, passed on as keyword arguments, sequences, as positional ones, or tensors.
        budget: how many parameters the adapter may have. None takes the number of parameters of the LoRA `like`, or,
            without `like`, of the adapter that `config` describes.
        like: a LoRA whose parameters are counted as the budget. If it has no `target_modules`, they are counted on the
            modules that `config` targets.
        loss_fn: takes the model and a batch and gives the loss, a scalar; None takes `model(**batch).loss`.
        batches: how many batches to use at most.
        score: "gradient" scores pairs as above. "activation" scores each direction of a subband by its share of the
            module's input variance, as EVA (arXiv 2410.07170) does, but divides it by the pair's parameters.
        min_rank: the least rank of each subband: an int, or a dict by module and subband like
            `WaRAConfig.rank_pattern`.
        max_rank: the largest rank of each subband, in the same format. If it is far below the size of a subband, a
            randomised SVD replaces the full one.
        max_bytes: how much memory the matrices of gradients or inputs may take. If all modules together need more,
            they are scored in groups, and the batches are run once for each group.

    Returns:
        A config that names the modules which get a rank, and a report.

    Raises:
        ValueError: the config has another form, or ranks for `aa0` beside other subbands; the model has adapters; the
            budget is less than one pair; there are no batches; the loss is no scalar; gradients are zero, not finite,
            or do not reach a target; or an argument is out of range.
        TypeError: a target is no linear layer, or the model is wrapped, as by `nn.DataParallel`.

    Evidence: on a small ViT allocated ranks score some points higher than even ranks. The difference is significant
    after Holm's correction on one task of four, where two were the aim. On text there is no gain, and perhaps a loss.
    The figures are in docs/ranks.md.

    Source: GoRA (arXiv 2502.12171) weighs gradients against cost; the greedy choice of single pairs is ours.
    """
    call = "allocate_ranks(model, config, dataloader)"
    check_argument(call, "model", model, "an nn.Module")
    check_unwrapped(model)
    check_argument(call, "dataloader", dataloader, "an iterable of batches")
    if not isinstance(config, WaRAConfig):
        raise TypeError(f"{call}: config must be a WaRAConfig, and is {short_form(config)}.")
    _check_arguments(config, batches, score, max_bytes, budget, like)
    targets = _targets(model, config, min_rank, max_rank)
    if like is not None:
        budget = lora_parameters_in(model, like, {name: target.layer for name, target in targets.items()})
    elif budget is None:
        budget = sum(
            config.ranks_of(name)[band] * target.cost(band)
            for name, target in targets.items()
            for band in target.bands
        )
    cheapest = min(target.cost(band) for target in targets.values() for band in target.bands)
    if budget < cheapest:
        raise ValueError(
            f"budget={budget:,} is less than one pair, the cheapest of which has {cheapest:,} parameters."
        )
    # A subband can never get more pairs than the whole budget pays for, so no more singular values are computed.
    counts = {
        name: {band: min(target.caps[band], budget // target.cost(band)) for band in target.bands}
        for name, target in targets.items()
    }
    # The floors are checked before the batches are run: that is the slow part.
    _check_floors(targets, counts, budget)
    spectra = _spectra(model, config, targets, dataloader, loss_fn, batches, score, max_bytes, counts)
    keys = [(name, band) for name, target in targets.items() for band in target.bands]
    items = [
        Item(spectra[name][band].gains.tolist(), targets[name].cost(band), targets[name].floors[band])
        for name, band in keys
    ]
    ranks: dict[str, dict[str, int]] = {name: {} for name in targets}
    for (name, band), rank in zip(keys, spend(items, budget), strict=True):
        ranks[name][band] = rank
    report = AllocationReport(
        score,
        budget,
        config.wavelet,
        config.levels,
        [
            ModuleAllocation(
                name,
                *target.shape,
                ranks[name],
                {band: float(spectrum.energy) for band, spectrum in spectra[name].items()},
                sum(rank * target.cost(band) for band, rank in ranks[name].items()),
            )
            for name, target in targets.items()
        ],
    )
    return Allocation(config.with_ranks(ranks, [name for name, _ in model.named_modules()]), report)


def _check_arguments(
    config: WaRAConfig, batches: int, score: str, max_bytes: int, budget: int | None, like: LoraConfig | None
) -> None:
    if not config.form_object.keeps_subbands:
        raise ValueError(
            f"Ranks are allocated for form='subband' alone, and not for form={config.form!r}, whose parameters are "
            "not pairs of the subbands of ΔW: no gradient of a weight tells what a rank of it gains."
        )
    if score not in SCORES:
        raise ValueError(f"score={score!r} is not one of {', '.join(map(repr, SCORES))}.")
    check_whole_number("batches", batches)
    check_whole_number("max_bytes", max_bytes)
    if budget is not None and like is not None:
        raise ValueError("Give `budget` or `like`, not both.")


def _targets(model: nn.Module, config: WaRAConfig, min_rank: Ranks, max_rank: Ranks) -> dict[str, _Target]:
    adapted = [repr(name) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(f"The model has adapters already, in {first_few(adapted)}. Pass the base model.")
    bases = WaRAModel.targets_of(model, config)
    if not bases:
        raise ValueError(f"target_modules={config.target_modules!r} names no module of the model.")
    others = [f"{name} ({type(base).__name__})" for name, base in bases.items() if not kind_of(base).is_linear]
    if others:
        raise TypeError(
            f"Ranks are allocated to linear layers alone, and {first_few(others)} is none. Leave it out of "
            "`target_modules` and `target_parameters`, or put it into `exclude_modules`."
        )
    targets = {}
    for name, base in bases.items():
        in_features, out_features = _get_in_out_features(base)
        shape = (int(out_features or 0), int(in_features or 0))
        ranks = config.ranks_of(name)
        bands = {band.name: band for band in subbands(config.levels) if ranks[band.name]}
        if "aa0" in bands and len(bands) > 1:
            raise ValueError(
                f"Module {name!r} has ranks for 'aa0', the whole matrix, and for subbands, which are parts of it: "
                "what one gains the other does not. Give the others, or 'aa0', rank 0 in `subband_ranks`."
            )
        floors, caps = {}, {}
        for band_name, band in bands.items():
            size = min(band.shape(*shape))
            floors[band_name] = _rank_of("min_rank", min_rank, name, band_name, 0)
            caps[band_name] = min(_rank_of("max_rank", max_rank, name, band_name, MAX_RANK), size)
            if floors[band_name] > caps[band_name]:
                raise ValueError(
                    f"min_rank={floors[band_name]} of subband {band_name!r} in module {name!r} is more than "
                    f"{caps[band_name]}, which max_rank and the subband's size allow."
                )
        targets[name] = _Target(base, shape, bands, floors, caps)
    return targets


def _rank_of(field_name: str, ranks: Ranks, module_name: str, band: str, default: int) -> int:
    found: Any = ranks
    if isinstance(ranks, Mapping):
        found = value_for(module_name, field_name, ranks, default)
        if isinstance(found, Mapping):
            found = found.get(band, default)
    check_whole_number(field_name, found, least=0, of=f" for module {module_name!r}")
    return int(found)


def _check_floors(targets: dict[str, _Target], counts: dict[str, dict[str, int]], budget: int) -> None:
    # Items without gains take their floors only, so `spend` raises exactly if the floors exceed the budget.
    floors = [Item([], target.cost(band), target.floors[band]) for target in targets.values() for band in target.bands]
    spend(floors, budget)
    if not any(count for by_band in counts.values() for count in by_band.values()):
        raise ValueError("max_rank leaves no subband a rank.")


def _spectra(
    model: nn.Module,
    config: WaRAConfig,
    targets: dict[str, _Target],
    dataloader: Iterable[Any],
    loss_fn: LossFunction | None,
    batches: int,
    score: str,
    max_bytes: int,
    counts: dict[str, dict[str, int]],
) -> dict[str, dict[str, Spectrum]]:
    # The generator is exhausted here, so that a module which is too large is refused before the model runs.
    groups = list(groups_within(max_bytes, {name: _needed(target, score) for name, target in targets.items()}))
    # In evaluation mode bitsandbytes may repack 4-bit weights in place, and the model must be left as it was.
    keep_unpacked(model)
    found: dict[str, dict[str, Spectrum]] = {}
    decompose = energies_of_gradient if score == "gradient" else energies_of_inputs
    # The caller may be under `no_grad` or `inference_mode`, where backward would give no gradients.
    with torch.inference_mode(False), torch.enable_grad(), in_eval_mode(model), with_frozen_parameters(model):
        device = next(model.parameters()).device
        # Each group of modules needs the same batches again, and a dataloader may shuffle or be exhausted.
        kept = [send_to_device(batch, device) for batch in itertools.islice(dataloader, batches)]
        if not kept:
            raise ValueError("The dataloader gives no batches.")
        for group in groups:
            layers = {name: (targets[name].layer, targets[name].shape) for name in group}
            matrices = (mean_gradients if score == "gradient" else input_covariances)(model, layers, kept, loss_fn)
            for name, matrix in matrices:
                found[name] = decompose(matrix, config.wavelet, counts[name])
                # Decompositions are rounded differently on different machines, and all must choose the same ranks.
                take_from_first_process(itertools.chain(*found[name].values()))
    if not any(float(spectrum.energy) for by_band in found.values() for spectrum in by_band.values()):
        what = "gradients" if score == "gradient" else "variances of the inputs"
        raise ValueError(f"All {what} are zero in these batches, and tell nothing of ranks. Pass other batches.")
    return found


def _needed(target: _Target, score: str) -> int:
    """Count the bytes of a target's matrices in float32.

    "activation" needs two matrices, the sum and the last call's summand, with a row and a column more for the mean.
    """
    return 4 * math.prod(target.shape) if score == "gradient" else 8 * (target.shape[1] + 1) ** 2
