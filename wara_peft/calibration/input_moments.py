"""Moments of the inputs of layers, summed up over batches in float64."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .processes import processes

MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(eq=False)
class Sums:
    """Number, mean μ and Σ (x − μ)(x − μ)ᵀ of vectors x, in float64.

    The variance is not computed from Σ x xᵀ: where the mean is large, almost all digits of the two would cancel.
    """

    count: int
    mean: Tensor
    centred: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Sums:
        """Give the sums over the rows of a matrix, (N, n). Products are in the dtype of `rows`, about their mean."""
        # The mean is rounded to the dtype of the rows, so the shifted rows have a small mean of their own.
        shift = rows.mean(0, dtype=torch.float64).to(rows.dtype) if len(rows) else rows.new_zeros(rows.shape[1])
        shifted = rows - shift
        rest = shifted.sum(0, dtype=torch.float64) / max(len(rows), 1)
        centred = (shifted.T @ shifted).double().addr_(rest, rest, alpha=-len(rows))
        return cls(len(rows), shift.double() + rest, centred)

    def add(self, other: Sums) -> None:
        """Add the sums over other vectors, in place. Source: Chan, Golub and LeVeque (1983)."""
        count = self.count + other.count
        if not count:
            return
        step = other.mean - self.mean
        self.centred.add_(other.centred).addr_(step, step, alpha=self.count * other.count / count)
        self.mean = self.mean + step * (other.count / count)
        self.count = count

    def add_other_processes(self) -> None:
        """Add the sums of all other processes, in place."""
        total = torch.tensor([self.count], device=self.mean.device)
        mean = self.mean * self.count
        for tensor in (total, mean):
            dist.all_reduce(tensor)
        mean /= total.clamp(min=1)
        step = self.mean - mean
        self.centred.addr_(step, step, alpha=self.count)
        dist.all_reduce(self.centred)
        self.count, self.mean = int(total), mean

    def copy(self) -> Sums:
        return Sums(self.count, self.mean, self.centred.clone())

    def products(self, with_mean: bool) -> Tensor:
        """Give XᵀX of all vectors as rows of X; `with_mean` puts a column of ones at the right of X."""
        total = torch.addr(self.centred, self.mean, self.mean, alpha=self.count)
        if not with_mean:
            return total
        sums = self.mean * self.count
        below = torch.cat((sums, sums.new_tensor([self.count])))
        return torch.cat((torch.cat((total, sums[:, None]), 1), below[None]))


@dataclass(eq=False)
class _Moment:
    """One moment for all layers that get the same tensor right after each other, as q, k and v do.

    The first of these layers leads, and the others follow it. Sums are computed when the leader is called.

    Attributes:
        leader: the layer that leads.
        total: the sums over all calls of the leader but the last.
        latest: the sums over the leader's last call.
        calls: number of calls of the leader.
        followed: the layers that were called with the leader's last input after it.
    """

    leader: nn.Module
    total: Sums
    latest: Sums | None = None
    calls: int = 0
    followed: set[nn.Module] = field(default_factory=set)

    def settle(self) -> None:
        """Add the sums of the last call to the total."""
        if self.latest is not None:
            self.total.add(self.latest)
            self.latest = None


class Moments:
    """Moments of the inputs, (N, n), of layers. Positions that a batch's mask leaves out do not count.

    Args:
        model: the model that has the layers.
        with_mean: whether the matrices X of inputs get a column of ones at the right. The last row of XᵀX then holds
            the sums over the inputs and their number.
    """

    def __init__(self, model: nn.Module, with_mean: bool = False) -> None:
        self.with_mean = with_mean
        base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
        self.model = cast(nn.Module, base)
        self.encoder = _encoder(self.model)
        self._in_encoder = set() if self.encoder is None else set(self.encoder.modules())
        self._of: dict[nn.Module, _Moment] = {}
        self._latest: tuple[Tensor, int | None, _Moment] | None = None
        self._masks: dict[str, Tensor] = {}
        self._encoded: Tensor | None = None

    @contextmanager
    def watching(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Context in which each call of a layer adds its input to the moments.

        The masks that the model is called with, and the encoder's output, are noted for that.
        """
        handles = [layer.register_forward_pre_hook(self.add, with_kwargs=True) for layer in layers]
        handles.append(self.model.register_forward_pre_hook(self._note_masks, with_kwargs=True))
        if self.encoder is not None:
            handles.append(self.encoder.register_forward_hook(self.keep_encoded))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start_batch(self, kwargs: Mapping[str, Any]) -> None:
        """Forget the batch before, and take the masks of this one, if it is a mapping."""
        self._latest = None
        self._masks = masks_of(kwargs)
        encoded = kwargs.get("encoder_outputs")
        self._encoded = None if encoded is None else encoded[0]

    def _note_masks(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A batch may be a tuple, or `loss_fn` may call the model in its own way. The call itself has the masks.
        named = arguments_by_name(model, args, kwargs)
        if masks_of(named):
            self.start_batch(named)

    def keep_encoded(self, encoder: nn.Module, args: Any, output: Any) -> None:
        self._encoded = output if isinstance(output, Tensor) else output[0]

    def add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        inputs = input_of(args, kwargs)
        version = version_of(inputs)
        moment = self._of.get(layer)
        # `_latest` holds the tensor, so no other tensor can take its place in memory and be mistaken for it.
        if self._latest is not None and is_unchanged(inputs, *self._latest[:2]):
            latest = self._latest[2]
            # A new layer joins only after the leader's first call: it has not seen the inputs of earlier ones.
            joins = moment is None and latest.calls == 1
            if joins or (moment is latest and layer is not latest.leader):
                self._of[layer] = latest
                latest.followed.add(layer)
                return
        if moment is not None:
            if layer is not moment.leader:
                moment = self._leave(layer)
            # The next call of the leader adds an input that these layers have not been given.
            self._let_go(moment)
            moment.settle()  # now, so that two sums are in memory at once, not three
        new = Sums.of(self._counted(layer, inputs))
        if moment is None:
            zeros = Sums(0, torch.zeros_like(new.mean), torch.zeros_like(new.centred))
            moment = self._of[layer] = _Moment(layer, zeros)
        moment.latest = new
        moment.calls += 1
        moment.followed.clear()
        self._latest = inputs, version, moment

    def _leave(self, layer: nn.Module) -> _Moment:
        """Let a layer stop following: it gets its own moment, the sums over the inputs that it has seen."""
        shared = self._of[layer]
        own = self._of[layer] = _Moment(layer, shared.total.copy(), calls=shared.calls)
        if layer in shared.followed and shared.latest is not None:
            own.total.add(shared.latest)
        return own

    def _let_go(self, moment: _Moment) -> None:
        """Make the layers leave that did not follow the leader's last call."""
        for layer, other in list(self._of.items()):
            if other is moment and layer is not moment.leader and layer not in moment.followed:
                self._leave(layer)

    def _counted(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """The inputs at all positions that count, as rows of a matrix, in float32 or better."""
        counting = self.counting(layer, inputs)
        if counting is not None:
            inputs = inputs[counting]
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def counting(self, layer: nn.Module, inputs: Tensor) -> Tensor | None:
        """A boolean for each position of a layer's input: whether it counts. None if all count."""
        # Layers of a decoder see the decoder's tokens, but for keys and values of its cross-attention: these see the
        # encoder's output, so the encoder's mask is theirs.
        mask = self._masks.get(MASKS[0])
        if self.encoder is not None and layer not in self._in_encoder and not self._is_encoded(inputs):
            mask = self._masks.get(MASKS[1])
        return None if mask is None else _fitted(mask.bool(), inputs.shape[:-1])

    def _is_encoded(self, inputs: Tensor) -> bool:
        # Models may pass on a view of the encoder's output, which is another object over the same memory.
        encoded = self._encoded
        return encoded is not None and inputs.shape == encoded.shape and inputs.data_ptr() == encoded.data_ptr()

    def sums(self) -> dict[nn.Module, Sums]:
        """Give the sums over the inputs of each layer that ran; one object for layers that always had the same."""
        for moment in set(self._of.values()):
            self._let_go(moment)
        for moment in set(self._of.values()):
            moment.settle()
        return {layer: moment.total for layer, moment in self._of.items()}

    def of_layers(self) -> dict[nn.Module, Tensor]:
        """Give XᵀX, in float64, of each layer that ran; one tensor for layers that always had the same inputs."""
        sums = self.sums()
        products = {total: total.products(self.with_mean) for total in set(sums.values())}
        return {layer: products[total] for layer, total in sums.items()}


def summed_over_processes(sums: dict[nn.Module, Sums], widths: Mapping[nn.Module, int]) -> dict[nn.Module, Sums]:
    """Add up the sums of all processes; layers share them if they do so in every process.

    Args:
        sums: the result of `Moments.sums` in this process, which may lack layers, and may change.
        widths: numbers of inputs of the layers that were watched, in the same order in all processes.
    """
    if processes() == 1:
        return sums
    # A number for each sum of this process, and -1 for a layer that never ran.
    numbers = {total: number for number, total in enumerate(dict.fromkeys(sums.values()))}
    own = [numbers[sums[layer]] if layer in sums else -1 for layer in widths]
    of_processes: list[Any] = [None] * processes()
    dist.all_gather_object(of_processes, own)
    keys = dict(zip(widths, zip(*of_processes, strict=True), strict=True))
    found: dict[tuple[int, ...], Sums] = {}
    for layer, key in keys.items():
        if key not in found and any(number >= 0 for number in key):
            device = next(layer.parameters()).device
            zeros = torch.zeros(widths[layer], dtype=torch.float64, device=device)
            # A copy, because this process may share the sum with a layer that another process does not share it with.
            found[key] = sums[layer].copy() if layer in sums else Sums(0, zeros, torch.diag(zeros))
            found[key].add_other_processes()
    return {layer: found[key] for layer, key in keys.items() if key in found}


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """Give the input of a linear layer's call, which may have come by its name, as in `layer(input=x)`."""
    return cast(Tensor, args[0] if args else next(iter((kwargs or {}).values())))


def version_of(tensor: Tensor) -> int | None:
    """Give autograd's count of in-place changes of a tensor; None for tensors of inference mode, which have none."""
    return None if tensor.is_inference() else tensor._version


def is_unchanged(tensor: Tensor, latest: Tensor | None, version: int | None) -> bool:
    """Whether a tensor is `latest` and was not changed in place since it had that version."""
    return tensor is latest and version is not None and version_of(tensor) == version


def arguments_by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give the arguments of a model's call by the names that its `forward` has for them, as far as it has names."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    except TypeError:  # the call itself says what is wrong
        return dict(kwargs)
    return {**bound.arguments, **kwargs}


def masks_of(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Give the masks among a model's arguments, under the names that transformers has for them."""
    masks = {name: kwargs[name] for name in MASKS if isinstance(kwargs.get(name), Tensor)}
    # PyTorch's encoders name their mask so. True, or -inf, says that a position is masked.
    padding = kwargs.get("src_key_padding_mask")
    return masks or ({MASKS[0]: padding == 0} if isinstance(padding, Tensor) else {})


def _fitted(mask: Tensor, lead: torch.Size) -> Tensor | None:
    """Give a mask of (batch, positions) in the leading shape of a layer's input; None if it has no such positions."""
    if mask.shape == lead:
        return mask
    if [size for size in lead if size != 1] == [size for size in mask.shape if size != 1]:
        return mask.reshape(lead)
    if mask.dim() == 2 and lead == mask.T.shape:  # the layer's inputs are sequence-first
        return mask.T
    return mask.flatten() if lead == (mask.numel(),) else None


def _encoder(base: Any) -> nn.Module | None:
    """The encoder of an encoder-decoder model, or None."""
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return None
    encoder = base.get_encoder()  # transformers gives the model itself if it finds no encoder in it
    return None if encoder is base else cast(nn.Module, encoder)
