"""Initialises A_s from data: for each subband, the directions in which the inputs of a layer are largest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_argument, check_unwrapped
from ..calibration.batches import arguments_of, in_eval_mode, run_model
from ..calibration.input_moments import Moments
from ..compiled import on_plain_model
from ..forms import SubbandFactor
from ..layers.base import WaRALayer
from ..layers.lookup import adapted_layers
from ..wavelet import Subband, into_band


@on_plain_model
def initialize_from_data(
    model: nn.Module, dataloader: Iterable[Any], adapter_name: str = "default", show_progress_bar: bool = True
) -> None:
    """Set each A_s to the directions of its subband in which the inputs are largest, for `init_weights="activation"`.

    Let X, of shape (N, n), be a layer's inputs over all batches. The rows of A_s become the top right-singular vectors
    of X S_in,s, of shape (N, n_j). No other matrix with as many orthonormal rows has a larger ‖A_s S_in,sᵀ Xᵀ‖. B_s
    stays zero, so the model still computes the same. Call the function once, before training, in one process or with
    the same batches in each.

    The function keeps only XᵀX, of shape (n, n), and one such matrix for all layers that share their inputs. Positions
    that a batch's `attention_mask` masks are not counted. In the decoder of an encoder-decoder model
    `decoder_attention_mask` decides, except for the encoder's output that cross-attention reads, where
    `attention_mask` does.

    Args:
        model: a model with a new adapter of `init_weights="activation"`.
        dataloader: a few batches: mappings, passed on as keyword arguments, sequences, as positional ones, or tensors.
        adapter_name: the adapter.
        show_progress_bar: whether to show how many batches are done.

    Raises:
        ValueError: there is no such adapter, its `init_weights` is another or it has been trained, no batch reached
            one of its layers, or the inputs of a layer are not finite. Nothing is changed then.
        TypeError: an argument is of another kind, or the model is wrapped, as by `nn.DataParallel`.
    """
    call = "initialize_from_data(model, dataloader)"
    check_argument(call, "model", model, "an nn.Module")
    check_argument(call, "dataloader", dataloader, "an iterable of batches")
    layers = _layers(model, adapter_name)
    moments = Moments(model)
    with in_eval_mode(model), moments.watching(layers), torch.no_grad():
        device = next(model.parameters()).device
        for batch in tqdm(dataloader, desc="Inputs of WaRA layers", disable=not show_progress_bar):
            batch = send_to_device(batch, device)
            moments.start_batch(arguments_of(batch)[1])
            run_model(model, batch)
    grams = cast(dict[WaRALayer, Tensor], moments.of_layers())
    _check_inputs(layers, grams)
    # All directions are found before the first A is written, so that an error leaves the adapter as it was.
    found = {layer: _top_directions(layer.factors(adapter_name)[0], grams[layer]) for layer in layers}
    with torch.no_grad():
        for layer, directions in found.items():
            factor = layer.factors(adapter_name)[0]
            for name, rows in directions.items():
                # An axis shorter than the rank has fewer directions; the rows beyond them stay as they were drawn.
                factor.subband(name).narrow(0, 0, len(rows)).copy_(rows)


def _layers(model: nn.Module, adapter_name: str) -> list[WaRALayer]:
    check_unwrapped(model)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if getattr(config, "init_weights", None) != "activation":
        state = "is not in the model" if config is None else "has another `init_weights` than 'activation'"
        raise ValueError(
            f"Adapter {adapter_name!r} {state}. Add it with WaRAConfig(init_weights='activation', ...) to initialise "
            "it from data."
        )
    layers = list(adapted_layers(model, adapter_name).values())
    for layer in layers:
        if any(columns.any() for columns in layer.wara_B[adapter_name].parameters()):
            raise ValueError(
                f"Adapter {adapter_name!r} is not new: its B is not zero in module {layer.module_name!r}, and other "
                "rows of A would make what it has learned wrong. Initialise it before training."
            )
    return layers


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
    """Give for each subband the eigenvectors of S_inᵀ XᵀX S_in with the largest eigenvalues, (at most r_s, n_j)."""
    largest_first: dict[tuple[int, str], Tensor] = {}
    found = {}
    for name, rank in factor.ranks.items():
        band = Subband.named(name)
        key = band.level, band.in_band
        if key not in largest_first:
            half = into_band(gram, factor.axis.wavelet, *key)  # XᵀX S_in, (n, n_j)
            whole = into_band(half.T, factor.axis.wavelet, *key)  # (n_j, n_j)
            # `eigh` gives eigenvalues in ascending order, and eigenvectors as columns.
            largest_first[key] = torch.linalg.eigh(whole).eigenvectors.flip(1).T
        found[name] = largest_first[key][:rank]
    return found
