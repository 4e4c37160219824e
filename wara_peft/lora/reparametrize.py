"""Puts WaRA inside of LoRA: the factors of PEFT's LoRA get weights that are computed in the wavelet domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..arguments import check_argument
from ..compiled import on_plain_model
from ..config import WaRAConfig
from ..config_fields.from_lora import subband_ranks as shared_out
from ..dequantized import unmark_dequantized
from ..forms import SUBBAND, ExpertsFactor, SubbandFactor
from ..forms.base import warn_about_levels
from ..forms.factors import IN_DIM, OUT_DIM
from ..wavelet import subbands
from .coefficients_file import keep_coefficients_in_checkpoints, keep_only_weights_in_checkpoints
from .copied_adapters import reparametrize_copies
from .guarded_functions import guard_functions, keep_adapter_in_refused_hotswaps
from .reparametrization_report import Reparametrization, ReparametrizedModule
from .reparametrized_layers import CLASSES, ReparametrizedLayer
from .sharded_coefficients import is_whole
from .span import describe_distance, factor_from_weight, nearest_coefficients, rounding_tolerance
from .state_dicts import attend_state_dicts

VARIANTS = (
    *("DoraLinearVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant", "ALoraLinearVariant"),
    *("VeloraLinearVariant", "QALoraLinearVariant", "KasaLinearVariant", "MontecloraLinearVariant"),
)
"""PEFT's variants of LoRA that read its factors, and leave it to autograd and the optimizer to change them."""
MEANT = ("pissa", "olora", "eva", "corda", "loftq", "lora_ga", "orthogonal", "mica")
"""How values of `init_lora_weights` begin whose first A and B mean something, so that they are not drawn again."""


@dataclass(frozen=True)
class _Side:
    """One factor of one module, with what it is going to be.

    Attributes:
        name: its name in the model.
        layer: PEFT's layer.
        factor: the factor that computes its weight.
        coefficients: the values of the factor's levels.
        distance: how far the weight is from what the factor can have.
    """

    name: str
    layer: nn.Module
    factor: SubbandFactor
    coefficients: list[Tensor | None]
    distance: float

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.layer.weight.detach()  # type: ignore[operator]
        return weight

    def is_exact(self) -> bool:
        return self.distance <= rounding_tolerance(self.factor, self.weight)

    def put_in_place(self) -> None:
        weight = self.layer.weight
        for level, rows in enumerate(self.coefficients):
            if rows is not None:
                getattr(self.factor, f"level{level}").detach().copy_(rows.detach())
        self.factor.requires_grad_(weight.requires_grad).train(self.layer.training)  # type: ignore[arg-type]
        self.layer.__class__ = CLASSES[type(self.layer)]
        self.layer.reparametrize(self.name, self.factor)  # type: ignore[operator]


@on_plain_model
def reparametrize_lora(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    wavelet: str = "haar",
    levels: int = 1,
    subband_ranks: dict[str, int] | None = None,
    project: bool = False,
) -> Reparametrization:
    """Let a LoRA of PEFT's train in the wavelet domain, where it stands, with half of its parameters at one level.

    ΔW = scaling · B A stays LoRA's, of rank R. But row i of A lies in one band of the in axis and column i of B in one
    band of the out axis, and what trains are their coefficients: A = Â and B = B̂ as in a `WaRAConfig` adapter.

    The model stays one with PEFT's LoRA for everybody else: `lora_A[name].weight` can be read, differentiated and
    written, checkpoints are LoRA's, which load without this package. Call it before an optimizer is made.
    An adapter that is later added to a `PeftModel` with the same config object is reparametrised too, as TRL's
    references have to be.

    A LoRA whose B is zero, as LoRA begins, is drawn again as WaRA draws its coefficients; what the seed gave A is
    thrown away. Any other is taken over exactly, which is possible if this function made it, or refused.

    Args:
        model: any module that holds LoRA layers of PEFT: a `PeftModel`, a model with `add_adapter`, `trainer.model`.
        adapter_name: the adapter; None means those that are active.
        wavelet: an orthogonal wavelet of PyWavelets.
        levels: number of decomposition levels L.
        subband_ranks: number of components of each subband, by name as in `WaRAConfig`; their sum is R. None shares R
            out evenly over the 3L + 1 subbands, and gives what remains to coarse ones first, in a level to aa and dd.
        project: take the nearest weights that lie in these bands, and report what is lost, in place of refusing.

    Returns:
        A report, which can be printed.

    Raises:
        ValueError: the model has no such LoRA, one that is merged, reparametrised already, of a variant that uses the
            factors in another way, with values that lie outside of the span, or with a rank below the number of
            subbands. Nothing is changed then.
        TypeError: an argument is of another type.

    Example:
        >>> model = get_peft_model(model, LoraConfig(r=16))  # doctest: +SKIP
        >>> print(wara_peft.reparametrize_lora(model))  # doctest: +SKIP
    """
    check_argument("reparametrize_lora(model, adapter_name)", "model", model, "an nn.Module")
    # The config checks wavelet, levels and names of subbands.
    settings = WaRAConfig(wavelet=wavelet, levels=levels, subband_ranks=subband_ranks)
    report = Reparametrization([], {})
    sides: list[_Side] = []
    shared = _shared_parameters(model)
    adapters = _adapters(model, adapter_name)
    for adapter in adapters:
        init = getattr(getattr(model, "peft_config", {}).get(adapter), "init_lora_weights", True)
        for name, layer in _lora_layers(model, adapter):
            reason = _why_left(layer, adapter, shared)
            if reason:
                report.left[name] = reason
                continue
            _check(layer, adapter, name)
            ranks = _ranks(settings, layer.r[adapter], name)
            pair = [_side(settings, layer, adapter, name, side, ranks) for side in ("lora_A", "lora_B")]
            if not all(side.is_exact() for side in pair):
                if _is_fresh(pair[1], init):
                    pair = _drawn(pair)
                elif not project:
                    raise ValueError(_refusal(name, pair, init))
            sides += pair
            report.modules.append(_reported(name, layer.r[adapter], pair))
    if not sides:
        reasons = "; ".join(dict.fromkeys(report.left.values()))
        raise ValueError(f"There is no LoRA here whose factors have weights of their own to reparametrise: {reasons}.")
    warn_about_levels(
        settings,
        {side.name: {"in" if side.factor.dim == IN_DIM else "out": side.factor.axis.length} for side in sides},
    )
    # All checks are done; only now the model changes.
    unmark_dequantized(model)
    for side in sides:
        side.put_in_place()
    attend_state_dicts(model)
    guard_functions()
    keep_adapter_in_refused_hotswaps(model)
    keep_coefficients_in_checkpoints(model)
    for adapter in adapters:
        kept = {"wavelet": wavelet, "levels": levels, "subband_ranks": subband_ranks}
        reparametrize_copies(model, adapter, kept, reparametrize_lora)
    return report


@on_plain_model
def plain_lora(model: nn.Module, adapter_name: str | None = None) -> None:
    """Undo `reparametrize_lora`: the factors of LoRA are plain parameters again, with exactly the present values.

    Args:
        model: the model.
        adapter_name: the adapter; None means all that are reparametrised.

    Raises:
        ValueError: the model has no such LoRA that is reparametrised.
    """
    check_argument("plain_lora(model, adapter_name)", "model", model, "an nn.Module")
    found = [
        factor
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for factors in (layer.lora_A, layer.lora_B)
        for name, factor in factors.items()
        if isinstance(factor, ReparametrizedLayer) and adapter_name in (None, name)
    ]
    if not found:
        which = "" if adapter_name is None else f" of the name {adapter_name!r}"
        raise ValueError(f"The model has no reparametrised LoRA{which}; `reparametrize_lora` makes one.")
    for factor in found:
        if not is_whole(factor.sample()):
            raise ValueError(
                f"{factor.name!r} is sharded, so it cannot get a plain weight. Save the model, whose files are "
                "LoRA's, and load these as LoRA."
            )
    for factor in found:
        factor.restore()
    if not any(isinstance(module, ReparametrizedLayer) for module in model.modules()):
        keep_only_weights_in_checkpoints(model)


def _adapters(model: nn.Module, adapter_name: str | None) -> list[str]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA of PEFT's. Add one first, such as by get_peft_model(model, "
            "LoraConfig(...)); a WaRAConfig adapter trains in the wavelet domain as it is."
        )
    if any(not isinstance(layer.lora_A, nn.ModuleDict) for layer in layers):
        raise ValueError("The model has AdaLoRA, whose factors are no layers of their own. Use LoraConfig.")
    present = sorted({name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)})
    if adapter_name is None:
        active = {name for layer in layers for name in layer.active_adapters}
        return [name for name in present if name in active]
    if adapter_name not in present:
        raise ValueError(f"There is no LoRA of the name {adapter_name!r}; there are {', '.join(map(repr, present))}.")
    return [adapter_name]


def _lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A):
            yield name, module


def _shared_parameters(model: nn.Module) -> set[int]:
    """Places of parameters that stand twice. PEFT ties a head's A to the transpose of an embedding's B."""
    counts = Counter(_place(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {place for place, count in counts.items() if count > 1}


def _place(parameter: Tensor) -> int:
    """Address of the values, or of the object where they have none, as on the meta device."""
    return (parameter.data_ptr() if type(parameter) is nn.Parameter else 0) or id(parameter)


def _why_left(layer: Any, adapter: str, shared: set[int]) -> str | None:
    """Why the LoRA of a module stays plain, or None."""
    if adapter in layer.lora_embedding_A:
        return "LoRA of embeddings has bare parameters"
    factors = layer.lora_A[adapter], layer.lora_B[adapter]
    if any(isinstance(factor, ReparametrizedLayer) for factor in factors):
        return None
    if any(getattr(factor, "groups", 1) > 1 for factor in factors):
        return "LoRA shares its rank out over the groups of a convolution"
    if any(_place(parameter) in shared for factor in factors for parameter in factor.parameters()):
        return "its factors are tied to those of another module"
    return None


def _check(layer: Any, adapter: str, name: str) -> None:
    if adapter in layer.merged_adapters:
        raise ValueError(f"Adapter {adapter!r} is merged in {name!r}; call `unmerge_adapter()` first.")
    for side in ("lora_A", "lora_B"):
        factor = getattr(layer, side)[adapter]
        if isinstance(factor, ReparametrizedLayer):
            raise ValueError(
                f"Adapter {adapter!r} is reparametrised already, in {name!r}, with {factor.factor.extra_repr()}. For "
                "other settings call `wara_peft.plain_lora(model)` first."
            )
        if type(factor) not in CLASSES:
            raise ValueError(
                f"{side} of {name!r} is a {type(factor).__name__}, which cannot be reparametrised; use LoraConfig "
                "without that option."
            )
        if factor.weight.is_meta:
            raise ValueError(f"{side} of {name!r} has no values (it is on the meta device); load the adapter first.")
        if not is_whole(factor.weight):
            raise ValueError(f"{side} of {name!r} is sharded; reparametrise the model before it is sharded.")
    variant = type(layer.lora_variant.get(adapter)).__name__
    if variant not in ("NoneType", *VARIANTS):
        raise ValueError(
            f"The LoRA of {name!r} is of the variant {variant}, which uses its factors in another way. Use LoraConfig "
            "without that option, or leave it plain."
        )


def _ranks(settings: WaRAConfig, rank: int, name: str) -> dict[str, int]:
    given = settings.subband_ranks
    if given is not None:
        if sum(given.values()) != rank:
            raise ValueError(
                f"subband_ranks={given!r} make {sum(given.values())} components, and the LoRA of {name!r} has "
                f"r={rank}. Choose ranks with that sum."
            )
        return given
    bands = len(subbands(settings.levels)) - 1  # all but the undecomposed matrix
    if rank < bands:
        raise ValueError(
            f"The LoRA of {name!r} has r={rank}, and levels={settings.levels} has {bands} subbands, each of which "
            "needs a component. Use a larger r, fewer levels, or say by `subband_ranks` which subbands there are."
        )
    return shared_out(rank, "rank", settings.levels)


def _side(settings: WaRAConfig, layer: Any, adapter: str, name: str, side: str, ranks: Mapping[str, int]) -> _Side:
    lora = getattr(layer, side)[adapter]
    weight = lora.weight.detach()
    dim = IN_DIM if side == "lora_A" else OUT_DIM
    length = weight.shape[1 if dim == IN_DIM else 0]
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    factor: SubbandFactor
    if experts > 1:
        factor = ExpertsFactor(settings.wavelet, settings.levels, length, ranks, dim, experts)
    else:
        kernel = tuple(weight.shape[2:]) if dim == IN_DIM else ()
        factor = SubbandFactor(settings.wavelet, settings.levels, length, ranks, dim, kernel)
    distance, found = nearest_coefficients(factor, factor_from_weight(factor, weight))
    return _Side(f"{name}.{side}.{adapter}", lora, factor.to(weight.device, weight.dtype), found, distance)


def _is_fresh(side_b: _Side, init: Any) -> bool:
    """Whether a LoRA is as it begins, with an A that may be any: B is zero."""
    means_something = isinstance(init, str) and init.lower().startswith(MEANT)
    return not means_something and not side_b.weight.any()


def _drawn(pair: list[_Side]) -> list[_Side]:
    """Both sides with first values as WaRA draws them."""
    SUBBAND.initialise({"wara_A": pair[0].factor, "wara_B": pair[1].factor}, True)
    return [
        _Side(
            side.name,
            side.layer,
            side.factor,
            [r if r is None else r.detach() for r in side.factor.coefficients()],
            0.0,
        )
        for side in pair
    ]


def _refusal(name: str, pair: list[_Side], init: Any) -> str:
    side = max(pair, key=lambda side: side.distance)
    meant = f" (init_lora_weights={init!r} gives the first values a meaning)" if isinstance(init, str) else ""
    return (
        f"The LoRA of {name!r} has values{meant} that cannot be taken over exactly: "
        f"{describe_distance(side.factor, side.distance)}. If it was reparametrised before, give the same wavelet, "
        "levels and subband_ranks; otherwise project=True takes the nearest values and says what is lost. "
        "The model is as it was."
    )


def _reported(name: str, rank: int, pair: list[_Side]) -> ReparametrizedModule:
    before = sum(side.weight.numel() for side in pair)
    after = sum(parameter.numel() for side in pair for parameter in side.factor.parameters())
    lost = 0.0 if all(side.is_exact() or side.distance == 0 for side in pair) else _lost(pair)
    return ReparametrizedModule(name, rank, before, after, lost)


def _lost(pair: list[_Side]) -> float:
    """‖B A − B̂ Â‖ / ‖B A‖, from products of matrices with R rows and columns."""
    before = [factor_from_weight(side.factor, side.weight).double() for side in pair]
    after = [side.factor.synthesis_of(side.coefficients) for side in pair]
    batched = isinstance(pair[0].factor, ExpertsFactor)
    (a, b), (kept_a, kept_b) = (
        [tensor.flatten(2) if batched else tensor.flatten(1)[None] for tensor in sides] for sides in (before, after)
    )
    all_a, all_b = torch.cat([a, kept_a], 1), torch.cat([b, -kept_b], 2)
    whole = ((b.mT @ b) * (a @ a.mT)).sum()
    rest = ((all_b.mT @ all_b) * (all_a @ all_a.mT)).sum()
    return float((rest.clamp_min(0) / whole).sqrt()) if whole > 0 else 0.0
