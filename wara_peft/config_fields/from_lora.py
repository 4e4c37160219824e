"""Converts a `LoraConfig` of PEFT: each field is carried over, converted, or named in a warning with a remedy."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from peft import LoraConfig

from ..wavelet import subbands

_INIT = "PEFT makes it from the base weights or from data; here `init_weights` has 'orthogonal' and 'activation'"
LORA_FIELDS = {
    "lora_alpha": "its name here is 'wara_alpha', and scaling = wara_alpha / R where R = (3 levels + 1) r, not r. "
    "`WaRAConfig.from_lora(lora_config)` keeps the scaling and the number of parameters",
    "alpha": "its name here is 'wara_alpha'",
    "lora_dropout": "its name here is 'wara_dropout'",
    "init_lora_weights": "its name here is 'init_weights', whose 'activation' is from data as EVA is, by "
    "`wara_peft.initialize_from_data`",
    "fan_in_fan_out": "leave it out, the orientation of a weight is read off its layer",
    "megatron_config": "Megatron's parallel layers are adapted by LoraConfig alone",
    "megatron_core": "Megatron's parallel layers are adapted by LoraConfig alone",
    "loftq_config": "quantize the base model without LoftQ; ΔW starts at zero",
    "eva_config": f"{_INIT}, which `wara_peft.initialize_from_data` fills from inputs as EVA does",
    "corda_config": _INIT,
    "lora_ga_config": _INIT,
    "use_dora": "there is no trained magnitude; leave it out, or use LoraConfig",
    "velora_config": "inputs are saved for backward whole; to save memory, checkpoint activations",
    "alora_invocation_tokens": "an adapter acts on all tokens; switch it with `disable_adapter` or `adapter_names`",
    "use_qalora": "quantized base layers are adapted as they are; leave it out",
    "qalora_group_size": "quantized base layers are adapted as they are; leave it out",
    "monteclora_config": "factors are not sampled; leave it out, or use LoraConfig",
    "layer_replication": "replicate the layers in the base model first, by "
    "`peft.tuners.tuners_utils.replicate_layers(model, layer_map)`, also before loading the adapter",
    "runtime_config": "nothing is offloaded per layer; leave it out",
    "lora_bias": "ΔW has no bias of its own; train those of the adapted modules with bias='wara_only'",
    "use_bdlora": "factors are not block-diagonal; for sharded serving export with `wara_peft.save_as_lora`",
    "arrow_config": "export the experts with `wara_peft.save_as_lora`, and route between these LoRAs",
    "loraplus_lr_ratio": "it is not a config's: see `wara_peft.optimizer_groups(model, lr, lr_ratio)`",
    "kasa_config": "there are no trained singular values; leave it out, or use LoraConfig",
}
"""What to use in place of fields of `LoraConfig`, under all their spellings, that `WaRAConfig` does not have."""
RENAMED = {"lora_alpha": "wara_alpha", "lora_dropout": "wara_dropout", "init_lora_weights": "init_weights"}
"""Fields whose values are carried over under another name."""
IMPLIED = frozenset(("peft_type", "peft_version", "fan_in_fan_out"))
"""Fields that need not be carried over: WaRA has its own value for them, or reads it off the layers."""
BOTH = "^(?="
"""Start of the patterns that `from_lora` makes of one for alpha and one for the rank. They may match no module."""

Match = Literal["parameters", "rank"]


def hint_for_keyword(name: str, value: Any, own_fields: Mapping[str, Any]) -> str | None:
    """Say what to use in place of a keyword that only LoRA knows; None for a field of `WaRAConfig`."""
    if name == "bias" and value == "lora_only":
        return "bias='lora_only' is called bias='wara_only' here"
    return None if name in own_fields else LORA_FIELDS.get(name)


def carried_fields(own_fields: Mapping[str, Any]) -> dict[str, str]:
    """Map the fields of `LoraConfig` that `fields_from_lora` carries over to their names in `WaRAConfig`."""
    names = [item.name for item in dataclasses.fields(LoraConfig)]
    same = {name: name for name in names if name in own_fields and name not in IMPLIED}
    return {**same, **{name: RENAMED[name] for name in names if name in RENAMED}}


def fields_from_lora(
    config: LoraConfig, ranks_for: Callable[[int], dict[str, int]], own_fields: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of the `WaRAConfig` that corresponds to a LoRA's, and the LoRA's settings that are left out.

    Args:
        config: the config of the LoRA.
        ranks_for: gives the ranks by subband that stand for a rank of the LoRA.
        own_fields: the fields of `WaRAConfig`, by name.
    """
    carried = carried_fields(own_fields)
    rank_pattern = config.rank_pattern or {}
    fields = {ours: getattr(config, name) for name, ours in carried.items()}
    ranks = {rank: ranks_for(rank) for rank in {config.r, *rank_pattern.values()}}
    # If all subbands get equal ranks everywhere, the single number `r` says it; otherwise every rank is spelled out.
    even = all("aa0" not in of_bands and len(set(of_bands.values())) == 1 for of_bands in ranks.values())
    of_config = ranks[config.r]
    fields["r"] = next(iter(of_config.values())) if even else max(1, min(of_config.values()))
    fields["subband_ranks"] = None if even else of_config
    fields["rank_pattern"] = {
        pattern: next(iter(ranks[rank].values())) if even else ranks[rank] for pattern, rank in rank_pattern.items()
    }
    fields["wara_alpha"], fields["alpha_pattern"] = _alphas(config, {r: sum(v.values()) for r, v in ranks.items()})
    left_out = [
        f"{item.name}={getattr(config, item.name)!r} ({LORA_FIELDS[item.name]})"
        for item in dataclasses.fields(config)
        if item.name not in carried and item.name not in IMPLIED and not _is_default(config, item)
    ]
    fields["bias"] = "wara_only" if config.bias == "lora_only" else config.bias
    if not (isinstance(config.init_lora_weights, bool) or config.init_lora_weights == "orthogonal"):
        fields["init_weights"] = True
        why = ", whose A is uniform" if config.init_lora_weights == "gaussian" else f": {_INIT}"
        left_out.append(f"init_lora_weights={config.init_lora_weights!r} (init_weights=True in its place{why})")
    return fields, left_out


def subband_ranks(rank: int, match: Match, levels: int) -> dict[str, int]:
    """Find ranks by subband with which WaRA has as many parameters, or the same total rank, as a LoRA.

    One unit of rank in a subband of level j has (m + n) / 2^j parameters if 2^j divides m and n; one unit of LoRA's
    rank has m + n. All subbands get the same rank first. What is left of the budget goes to some of them, one unit
    each. To match parameters, finer levels come first, which always spends the budget exactly. To match the rank,
    coarser levels come first. Within a level, aa and dd come first.

    Args:
        rank: r of the LoRA.
        match: "parameters" or "rank".
        levels: number of decomposition levels.
    """
    bands = [band for band in subbands(levels) if band.level]
    cost = {band.name: 2 ** (levels - band.level) if match == "parameters" else 1 for band in bands}
    budget = rank * 2**levels if match == "parameters" else rank
    each, left = divmod(budget, sum(cost.values()))
    ranks = dict.fromkeys(cost, each)
    in_level = ("aa", "dd", "ad", "da")
    for band in sorted(bands, key=lambda band: (-cost[band.name], -band.level, in_level.index(band.name[:2]))):
        if cost[band.name] <= left:
            ranks[band.name] += 1
            left -= cost[band.name]
    return ranks


def _alphas(config: LoraConfig, total: Mapping[int, int]) -> tuple[float, dict[str, float]]:
    """Find `wara_alpha` and `alpha_pattern` with which every module has the LoRA's scaling."""

    def alpha_for(alpha: float, rank: int) -> float:
        ratio = total[rank] / rank
        return alpha * (math.sqrt(ratio) if config.use_rslora else ratio)

    pattern: dict[str, float] = {}
    same_ratio = len({total[rank] * config.r == total[config.r] * rank for rank in total}) == 1
    by_rank = {} if same_ratio else config.rank_pattern or {}
    # The first match counts. So the pattern for modules that match both an alpha's and a rank's pattern comes first.
    for alpha_key, alpha in (config.alpha_pattern or {}).items():
        for rank_key, rank in by_rank.items():
            pattern[rf"{BOTH}(?:.*\.)?(?:{rank_key})$)(?:.*\.)?(?:{alpha_key})"] = alpha_for(alpha, rank)
        pattern[alpha_key] = alpha_for(alpha, config.r)
    for rank_key, rank in by_rank.items():
        pattern.setdefault(rank_key, alpha_for(config.lora_alpha, rank))
    return alpha_for(config.lora_alpha, config.r), pattern


def _is_default(config: LoraConfig, item: dataclasses.Field[Any]) -> bool:
    value = getattr(config, item.name)
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return bool(value == default) or value is None


def warn_of_left_out(left_out: list[str], by: str = "WaRAConfig.from_lora") -> None:
    """Give one warning that names all settings of a LoRA that its `WaRAConfig` does not have."""
    if left_out:
        warnings.warn(f"{by} does not carry over {'; '.join(left_out)}.", stacklevel=3)
