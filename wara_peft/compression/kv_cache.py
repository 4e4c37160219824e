"""A key-value cache that keeps each head's values in low rank, and keys too in models without rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..arguments import check_argument, check_whole_number
from ..compiled import on_plain_model
from ..factorized.base import check_values
from .budget.depth import depth_shares
from .statistics.layer_statistics import LayerStatistics, check_finite
from .targets import errors_naming


@dataclass(frozen=True, eq=False)
class HeadBases:
    """The subspace of each head for one projection: E, (heads, d, r), with orthonormal columns, and an offset c.

    The offset has shape (heads, 1, d). A state v is kept as z = Eᵀ (v − c) and restored as E z + c.
    """

    basis: Tensor
    offset: Tensor

    @property
    def rank(self) -> int:
        return self.basis.shape[-1]

    def compress(self, states: Tensor) -> Tensor:
        """Give z = Eᵀ (v − c), (batch, heads, length, r), for states v, (batch, heads, length, d)."""
        return (states - self.offset.to(states)) @ self.basis.to(states)

    def restore(self, kept: Tensor) -> Tensor:
        """Give E z + c, (batch, heads, length, d), for kept numbers z, (batch, heads, length, r)."""
        return kept @ self.basis.to(kept).mT + self.offset.to(kept)


@dataclass(frozen=True)
class LayerBases:
    """The bases for one layer of a model. None means that the cache keeps the states as they are."""

    values: HeadBases | None
    keys: HeadBases | None = None


@on_plain_model
@torch.no_grad()
def cache_bases(
    model: PreTrainedModel,
    rank: int,
    statistics: Mapping[str, LayerStatistics] | None = None,
    *,
    keys: bool = False,
    by_depth: bool = False,
) -> list[LayerBases]:
    """Find for each head the r directions in which its values vary most. A `LowRankCache` is made from them.

    W_h, (d, n), are the head's rows of the projection, b its bias, and G the moment of its inputs about their mean μ.
    The columns of E are the first eigenvectors of W_h G W_hᵀ, and c = W_h μ + b. Then E Eᵀ (v − c) + c is the best
    approximation of rank r of the values v that calibration saw. Without statistics G = I and c = b. The model itself
    stays as it is. With grouped queries there is one basis for each head of keys and values.

    After Zhang et al., "LoRC", arXiv 2410.03111, which truncates the weights of all heads together, without inputs.

    Args:
        model: a decoder with `v_proj` (and `k_proj`) in its attentions, such as Llama, Qwen or OPT.
        rank: r, the rank of each head.
        statistics: the result of `calibrate` with these projections among its targets.
        keys: whether keys are kept in low rank too. Models with rotary embeddings are refused then, because these turn
            keys after their projection, by another angle at each position.
        by_depth: let r be the most that a layer gets. Layers nearer to the output get less, down to r / 2, by the
            condition numbers from their block to the top, as in `compress(allocation="depth")`.

    Returns:
        Bases, one entry for each layer.

    Raises:
        ValueError: `rank` is out of range; weights or statistics are not finite; statistics are missing or of another
            layer; `keys` is set and the model has rotary embeddings; the model changes its values after `v_proj`; or
            its cache is not one that only grows.
    """
    check_argument("cache_bases(model, rank)", "model", model, "an nn.Module")
    projections = _projections(model, "v_proj")
    if keys and _is_rotary(model):
        raise ValueError(
            f"The keys of {type(model).__name__} are turned by rotary embeddings after their projection, and are of "
            "no low rank together. Use keys=False."
        )
    found = _bases(model, projections, rank, statistics, by_depth)
    of_keys: Sequence[HeadBases | None] = [None] * len(found)
    if keys:
        of_keys = _bases(model, _projections(model, "k_proj"), rank, statistics, by_depth)
    return [LayerBases(value, key) for value, key in zip(found, of_keys, strict=True)]


class LowRankCache(Cache):
    """A cache of transformers for `generate` and forward that keeps r numbers for each position and head's values.

    It grows as `DynamicCache` does. Attention gets E Eᵀ (v − c) + c in place of the values v. Keys are exact, unless
    the bases have a part for keys.

    Args:
        bases: the result of `cache_bases`, one entry for each layer. Several caches may share it.

    Example:
        >>> bases = cache_bases(model, 32, statistics)  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=LowRankCache(bases))  # doctest: +SKIP
    """

    def __init__(self, bases: Sequence[LayerBases]) -> None:
        super().__init__(layers=[_LowRankLayer(layer) for layer in bases])


class _LowRankLayer(DynamicLayer):
    def __init__(self, bases: LayerBases) -> None:
        super().__init__()
        self.bases = bases

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # The base class keeps what it is given: low-rank states are compressed before it and restored after it. New
        # states are restored with the old ones, so a position has the same values in every step.
        of_keys, of_values = self.bases.keys, self.bases.values
        keys, values = super().update(
            key_states if of_keys is None else of_keys.compress(key_states),
            value_states if of_values is None else of_values.compress(value_states),
        )
        return (
            keys if of_keys is None else of_keys.restore(keys),
            values if of_values is None else of_values.restore(values),
        )


def _projections(model: PreTrainedModel, end: str) -> list[tuple[str, nn.Module, int]]:
    """Give name, module and width of a head for the attentions' projections called `end`, in the order of layers."""
    config = model.config
    found: dict[int, tuple[str, nn.Module, int]] = {}
    for name, attention in model.named_modules():
        projection = getattr(attention, end, None)
        index, width = getattr(attention, "layer_idx", None), getattr(attention, "head_dim", None)
        if isinstance(projection, nn.Module) and index is not None and width is not None:
            if hasattr(attention, "v_norm"):
                raise ValueError(f"{name!r} normalises its values after their projection, and is not supported.")
            found[int(index)] = (f"{name}.{end}" if name else end, projection, int(width))
    layers = getattr(config, "num_hidden_layers", len(found))
    if getattr(config, "is_encoder_decoder", False) or len(found) != layers or not found:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} attentions with {end!r}, layer_idx and head_dim in {layers} "
            "layers: only decoders with one in each are supported."
        )
    windowed = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [windowed])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"{type(model).__name__} has layers of kinds {sorted(kinds)}, and full attention alone is "
            "supported, whose cache only grows."
        )
    return [found[index] for index in sorted(found)]


def _is_rotary(model: PreTrainedModel) -> bool:
    # Models share no base class for rotary embeddings, only this word in its name.
    return any("Rotary" in type(module).__name__ for module in model.modules())


def _bases(
    model: PreTrainedModel,
    projections: list[tuple[str, nn.Module, int]],
    rank: int,
    statistics: Mapping[str, LayerStatistics] | None,
    by_depth: bool,
) -> list[HeadBases]:
    width = projections[0][2]
    check_whole_number("rank", rank, most=width, of=f" for heads of width {width}")
    for name, projection, _ in projections:
        with errors_naming(name):
            check_values(cast(Tensor, projection.weight))
    shares = [1.0] * len(projections)
    if by_depth:
        shares = depth_shares({name: projection for name, projection, _ in projections})
    return [
        _head_bases(name, projection, width, max(1, round(rank * share)), statistics)
        for (name, projection, width), share in zip(projections, shares, strict=True)
    ]


def _head_bases(
    name: str, projection: nn.Module, width: int, rank: int, statistics: Mapping[str, LayerStatistics] | None
) -> HeadBases:
    weight = cast(Tensor, projection.weight).detach().double()
    bias = cast("Tensor | None", projection.bias)
    offset = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    moment = None
    if statistics is not None:
        entry = statistics.get(name)
        if entry is None or entry.moment is None or entry.shape != tuple(weight.shape):
            raise ValueError(
                f"statistics have no inputs of {name!r} with shape {tuple(weight.shape)}; calibrate this model with "
                "statistics=['inputs'] and this layer among target_modules."
            )
        check_finite(name, entry)
        moment = entry.moment.to(weight)
        if entry.mean is not None:
            mean = entry.mean.to(weight)
            # The offset c takes the mean out of the states, so E only has to span what varies about it.
            moment = moment - torch.outer(mean, mean)
            offset = offset + weight @ mean
    heads = weight.view(-1, width, weight.shape[1])  # (heads, d, n)
    gram = heads @ (heads.mT if moment is None else moment @ heads.mT)
    # Rounding leaves the product slightly asymmetric. `eigh` gives the largest eigenvalues last, hence the flip below.
    _, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    dtype = cast(Tensor, projection.weight).dtype
    return HeadBases(vectors.flip(-1)[..., :rank].to(dtype), offset.view(-1, 1, width).to(dtype))
