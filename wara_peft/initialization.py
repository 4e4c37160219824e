"""First values of A_s from data: the directions in which the inputs of a layer are largest, for each subband."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from .forms import SubbandFactor
from .layer import WaRALayer
from .wavelet import Axis, adjoint


def initialize_from_data(
    model: nn.Module, dataloader: Iterable[Any], adapter_name: str = "default", show_progress_bar: bool = True
) -> None:
    """Give A_s the directions of a subband in which the inputs are largest, for `init_weights="activation"`.

    With inputs X of shape (N, n) over all batches, the rows of A_s are the top right-singular vectors of X S_in,s, of
    shape (N, n_j): among all orthonormal A_s those that keep most of ‖A_s S_in,sᵀ Xᵀ‖. B_s is zero and stays it. Call
    it once, before training, in one process or with the same batches in each.

    Only XᵀX, of shape (n, n), is kept of the inputs, once for layers that share them. Positions that a batch's
    `attention_mask` leaves out do not count; in the decoder of an encoder-decoder model those that its
    `decoder_attention_mask` leaves out, and of the encoder's result, which cross-attention sees, again the former.

    Args:
        model: a model with a new adapter of `init_weights="activation"`.
        dataloader: a few batches: mappings, passed on as keyword arguments, sequences, as positional ones, or tensors.
        adapter_name: the adapter.
        show_progress_bar: whether to show how many batches are done.

    Raises:
        ValueError: there is no such adapter, it is not of that kind or has been trained, no batch reached one of its
            layers, or the inputs of one are not finite. Nothing is changed then.
    """
    layers = _layers(model, adapter_name)
    moments = _Moments(model)
    with _evaluating(model), _called_before(layers, moments), torch.no_grad():
        device = next(model.parameters()).device
        for batch in tqdm(dataloader, desc="Inputs of WaRA layers", disable=not show_progress_bar):
            args, kwargs = _arguments(send_to_device(batch, device))
            moments.start_batch(kwargs)
            model(*args, **kwargs)
    grams = moments.of_layers()
    _check_inputs(layers, grams)
    found = {layer: _top_directions(layer.factors(adapter_name)[0], grams[layer]) for layer in layers}
    with torch.no_grad():
        for layer, directions in found.items():
            factor = layer.factors(adapter_name)[0]
            for name, rows in directions.items():
                # An axis shorter than the rank has fewer directions; the rows beyond them stay as they were drawn.
                factor.subband(name).narrow(0, 0, len(rows)).copy_(rows)


def _layers(model: nn.Module, adapter_name: str) -> list[WaRALayer]:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if getattr(config, "init_weights", None) != "activation":
        state = "is not in the model" if config is None else "has another `init_weights` than 'activation'"
        raise ValueError(
            f"Adapter {adapter_name!r} {state}. Add it with WaRAConfig(init_weights='activation', ...) to initialise "
            "it from data."
        )
    layers = [module for module in model.modules() if isinstance(module, WaRALayer) and adapter_name in module.wara_A]
    for layer in layers:
        if any(columns.any() for columns in layer.wara_B[adapter_name].parameters()):
            raise ValueError(
                f"Adapter {adapter_name!r} is not new: its B is not zero in module {layer.module_name!r}, and other "
                "rows of A would make what it has learned wrong. Initialise it before training."
            )
    return layers


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, which leaves dropout out; each module goes back to its own mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _called_before(layers: list[WaRALayer], moments: _Moments) -> Iterator[None]:
    """While it lasts, hand the input of each layer to the moments, and what encoders return."""
    handles = [layer.register_forward_pre_hook(moments.add) for layer in layers]
    if moments.encoder is not None:
        handles.append(moments.encoder.register_forward_hook(moments.keep_encoded))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(eq=False)
class _Moment:
    """XᵀX of the layers that get one tensor right after each other, as q, k and v do.

    Attributes:
        leader: the first of them, at whose calls it grows.
        total: the sum over all calls.
        latest: what the last call added.
        calls: number of calls.
        followed: the layers that have been called with the leader's last input too.
    """

    leader: WaRALayer
    total: Tensor | float = 0.0
    latest: Tensor | float = 0.0
    calls: int = 0
    followed: set[WaRALayer] = field(default_factory=set)


class _Moments:
    """XᵀX of the inputs of layers."""

    def __init__(self, model: nn.Module) -> None:
        self.encoder = _encoder(model)
        self._in_encoder = set() if self.encoder is None else set(self.encoder.modules())
        self._of: dict[WaRALayer, _Moment] = {}
        self._latest: tuple[Tensor, _Moment] | None = None
        self._mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._encoded: Tensor | None = None

    def start_batch(self, kwargs: Mapping[str, Any]) -> None:
        self._latest = None
        self._mask, self._decoder_mask = (
            mask if isinstance(mask := kwargs.get(name), Tensor) else None
            for name in ("attention_mask", "decoder_attention_mask")
        )
        encoded = kwargs.get("encoder_outputs")
        self._encoded = None if encoded is None else encoded[0]

    def keep_encoded(self, encoder: nn.Module, args: Any, output: Any) -> None:
        self._encoded = output if isinstance(output, Tensor) else output[0]

    def add(self, layer: WaRALayer, args: tuple[Any, ...]) -> None:
        inputs: Tensor = args[0]
        moment = self._of.get(layer)
        if self._latest is not None and self._latest[0] is inputs:
            latest = self._latest[1]
            joins = moment is None and latest.calls == 1
            if joins or (moment is latest and layer is not latest.leader):
                self._of[layer] = latest
                latest.followed.add(layer)
                return
        if moment is None:
            moment = self._of[layer] = _Moment(layer)
        elif layer is not moment.leader:
            moment = self._leave(layer)
        self._let_go(moment)
        rows = self._counted(layer, inputs)
        moment.latest = rows.T @ rows
        moment.total = moment.total + moment.latest
        moment.calls += 1
        moment.followed.clear()
        self._latest = inputs, moment

    def _leave(self, layer: WaRALayer) -> _Moment:
        """Give a layer that no longer goes with its moment one of its own, of what it has seen so far."""
        shared = self._of[layer]
        seen = shared.total if layer in shared.followed else shared.total - shared.latest
        own = self._of[layer] = _Moment(layer, seen, calls=shared.calls)
        return own

    def _let_go(self, moment: _Moment) -> None:
        """Have the layers leave that have not followed the last call."""
        for layer, other in list(self._of.items()):
            if other is moment and layer is not moment.leader and layer not in moment.followed:
                self._leave(layer)

    def _counted(self, layer: WaRALayer, inputs: Tensor) -> Tensor:
        """The positions that count, as rows, in float32 or better."""
        mask = self._mask
        if self.encoder is not None and layer not in self._in_encoder and not self._is_encoded(inputs):
            mask = self._decoder_mask
        if mask is not None and mask.shape == inputs.shape[:-1]:
            inputs = inputs[mask.bool()]
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def _is_encoded(self, inputs: Tensor) -> bool:
        encoded = self._encoded
        return encoded is not None and inputs.shape == encoded.shape and inputs.data_ptr() == encoded.data_ptr()

    def of_layers(self) -> dict[WaRALayer, Tensor]:
        for moment in set(self._of.values()):
            self._let_go(moment)
        return {layer: cast(Tensor, moment.total) for layer, moment in self._of.items()}


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model, or None."""
    base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return None
    encoder = base.get_encoder()
    return None if encoder is base else cast(nn.Module, encoder)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _check_inputs(layers: list[WaRALayer], grams: dict[WaRALayer, Tensor]) -> None:
    for layer in layers:
        if layer not in grams:
            raise ValueError(
                f"No batch reached module {layer.module_name!r}, so its A cannot be initialised from data. Pass a "
                "dataloader with batches that use it, or leave the module out with `exclude_modules`."
            )
        if not grams[layer].isfinite().all():
            raise ValueError(
                f"The inputs of module {layer.module_name!r} are not finite, so its A cannot be initialised from "
                "them. Look for broken batches or weights."
            )


def _top_directions(factor: SubbandFactor, gram: Tensor) -> dict[str, Tensor]:
    """For each subband the eigenvectors of S_inᵀ XᵀX S_in with the largest eigenvalues, (at most r_s, n_j)."""
    largest_first: dict[tuple[int, str], Tensor] = {}
    for name in factor.subbands:
        key = level, band = int(name[2:]), name[1]
        if key not in largest_first:
            half = _into_band(gram, factor.axis.wavelet, level, band)  # XᵀX S_in, (n, n_j)
            whole = _into_band(half.T, factor.axis.wavelet, level, band)  # (n_j, n_j)
            largest_first[key] = torch.linalg.eigh(whole).eigenvectors.flip(1).T
    return {name: largest_first[int(name[2:]), name[1]][:rank] for name, rank in factor.ranks.items()}


def _into_band(rows: Tensor, wavelet: str, level: int, band: str) -> Tensor:
    """S_{level,band}ᵀ of each row."""
    axis = Axis(wavelet, rows.shape[1], ("",) * level + (band * len(rows),))
    return cast(Tensor, adjoint(rows, axis, dim=1)[level])
