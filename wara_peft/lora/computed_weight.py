"""The tensor that a reader of a reparametrised factor's `weight` gets: computed when used, written through.

PEFT and the tools around it read `lora_A[name].weight` outside of the factor's forward, and some write to it in place
or through `.data`. The weight of a reparametrised factor is computed from coefficients, so a plain tensor would be a
temporary, and what is written to it would be lost without a word. `ComputedWeight` knows the factor instead:

- Its dtype, shape and device are known without computing anything. PEFT asks for the dtype in every forward.
- An operation that reads it gets the factor's present weight. Gradients flow back to the coefficients.
- An operation that writes to it, to a view of it or to its `.data` sets the coefficients, or raises a ValueError where
  no coefficients make such a weight.

`__torch_function__` sees attributes and functions of Python. What reaches PyTorch's operators, from C++ too, is seen
by `__torch_dispatch__`, below autograd, where schemas say what an operator writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class WeightSource(Protocol):
    """What a `ComputedWeight` asks of the factor that it is the weight of.

    Attributes:
        last_read: what the last read without a graph gave, the device, and whether inference mode was on.
    """

    last_read: tuple[ComputedWeight, torch.device, bool] | None

    def coefficients(self) -> Sequence[nn.Parameter]:
        """The parameters that the weight is computed from."""
        ...

    def sample(self) -> Tensor:
        """One of them, which tells dtype and device."""
        ...

    def weight_shape(self) -> torch.Size:
        """The weight's shape."""
        ...

    def computed(self) -> Tensor:
        """The weight as a new plain tensor."""
        ...

    def gradients(self, grad: Tensor) -> Sequence[Tensor]:
        """The gradients of the coefficients for a gradient of the weight."""
        ...

    def prepared(self, weight: Tensor) -> Callable[[], None]:
        """What sets the coefficients so that this is the weight. Raises a ValueError where none do."""
        ...


class ComputedWeight(Tensor):
    """The weight of a reparametrised factor, or a view of it.

    Attributes:
        source: the factor.
        values_of_view: None for the weight itself, whose values are computed at every use; else a plain view of
            `whole`.
        whole: a plain tensor with all of the weight, which all views of it share. Every use brings it up to date.
        own_dtype: its dtype.
        kept: the last values whose address somebody has asked for, which live as long as this tensor.
        is_layers: whether this is what the layer gives as its weight, and no `.data`, view or detached tensor of it.
            Whether it trains is then a matter of the coefficients.
    """

    # Slots make `torch.utils.swap_tensors` refuse such a tensor. PEFT's hotswap then writes through `.data`.
    __slots__ = ("is_layers", "kept", "own_dtype", "source", "values_of_view", "whole")

    source: WeightSource
    values_of_view: Tensor | None
    whole: Tensor | None
    kept: Tensor | None
    is_layers: bool
    own_dtype: torch.dtype

    @staticmethod
    def __new__(
        cls: type[ComputedWeight], source: WeightSource, view: Tensor | None = None, whole: Tensor | None = None
    ) -> ComputedWeight:
        like = source.sample() if view is None else view
        shape = source.weight_shape() if view is None else view.shape
        place: dict[str, Any] = {}
        if view is not None:
            place = {"strides": view.stride(), "storage_offset": view.storage_offset()}
        made: ComputedWeight = Tensor._make_wrapper_subclass(cls, shape, **place, dtype=like.dtype, device=like.device)
        made.source, made.values_of_view, made.whole, made.kept, made.is_layers = source, view, whole, None, False
        made.own_dtype = like.dtype
        return made

    def values(self) -> Tensor:
        """The present values, as a plain tensor without a graph."""
        whole = _present(self.source)
        return whole if self.values_of_view is None else self.values_of_view

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _DTYPE:  # PEFT asks for it in every forward
            return args[0].own_dtype
        own = None
        if args and isinstance(args[0], ComputedWeight):
            own = _IN_PYTHON.get(func) or (_OF_LAYERS.get(func) if args[0].is_layers else None)
        if own is not None:
            return own(func, *args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default and args[0].values_of_view is None:
            return ComputedWeight(args[0].source)  # also for `.data`, which people keep: it always has present values
        if func.namespace == "c10d":
            raise RuntimeError(
                "A collective cannot use the weight of a reparametrised LoRA, which is computed from coefficients. "
                "Pass `weight.detach().clone()`, or take `wara_peft.plain_lora(model)` first."
            )
        wholes: dict[WeightSource, Tensor] = {}  # an operator may get a weight twice, also as two views of it

        def plain(weight: ComputedWeight) -> Tensor:
            if weight.source not in wholes:
                wholes[weight.source] = _present(weight.source)
            return wholes[weight.source] if weight.values_of_view is None else weight.values_of_view

        kwargs = kwargs or {}
        result = func(
            *tree_map_only(ComputedWeight, plain, args),
            **tree_map_only(ComputedWeight, plain, kwargs),
        )
        written = _written(func, args, kwargs)
        # An operator may write to several weights. All are checked before the first is set.
        for write in [source.prepared(wholes[source]) for source in {weight.source for weight in written}]:
            write()

        def as_seen(tensor: Tensor) -> Tensor:
            """A result that shares memory with the weight, as a tensor that writes to it too."""
            for source, whole in wholes.items():
                if tensor is whole:
                    own = [weight for weight in written if weight.source is source]
                    return own[0] if own else ComputedWeight(source)
                if _share_memory(tensor, whole):
                    _SHARED[id(source)] = whole
                    return ComputedWeight(source, tensor, whole)
            return tensor

        return tree_map_only(Tensor, as_seen, result)


def read_weight(source: WeightSource, sample: Tensor) -> ComputedWeight:
    """The weight of a factor, with a node in the autograd graph if gradients are recorded.

    Args:
        source: the factor.
        sample: its `sample()`.
    """
    weight: ComputedWeight
    if torch.is_grad_enabled():
        coefficients = source.coefficients()
        if any(rows.requires_grad for rows in coefficients):
            weight = _Read.apply(source, *coefficients)  # type: ignore[no-untyped-call]
            weight.is_layers = True
            return weight
    # Without a graph one tensor serves all reads, as it has no values. Making it takes longer than the rest of a read.
    known = source.last_read
    if (
        known is not None
        and known[0].own_dtype is sample.dtype
        and known[1] == sample.device
        and known[2] is torch.is_inference_mode_enabled()
        and known[0].kept is None
    ):
        return known[0]
    weight = ComputedWeight(source)
    weight.is_layers = True
    source.last_read = weight, sample.device, torch.is_inference_mode_enabled()
    return weight


class _Read(torch.autograd.Function):
    """The weight as a function of the coefficients, which computes nothing."""

    @staticmethod
    def forward(ctx: Any, source: WeightSource, *coefficients: Tensor) -> Tensor:
        ctx.source, ctx.read = source, [(rows, rows._version) for rows in coefficients]
        return ComputedWeight(source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Operators that save the weight for backward save no values, and would use coefficients changed since.
        if any(rows._version != version for rows, version in ctx.read):
            raise RuntimeError(
                "The coefficients of a reparametrised LoRA were changed in place between the forward that read its "
                "weight and the backward. Call backward before the optimizer's step."
            )
        return None, *ctx.source.gradients(grad)


_SHARED: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""The tensor that all views of one weight share, by the id of the factor, which views keep alive."""


def _present(source: WeightSource) -> Tensor:
    """The present weight, in the tensor that its views share if there are any."""
    with torch.inference_mode(False), torch.no_grad():  # a view may outlive the mode in which it was taken
        weight, shared = source.computed(), _SHARED.get(id(source))
        if shared is None or (shared.dtype, shared.device) != (weight.dtype, weight.device):
            return weight
        return shared.copy_(weight)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[ComputedWeight]:
    """The weights that an operator writes to, by its schema."""
    if not func._schema.is_mutable:
        return []
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    found: list[ComputedWeight] = []
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            tree_map_only(ComputedWeight, found.append, named.get(argument.name))
    return found


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.layout == other.layout == torch.strided
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
    )


# What Python code asks of a tensor itself and no operator sees.


def _set_data(_: Any, weight: ComputedWeight, values: Tensor) -> None:
    if weight.values_of_view is not None:
        raise RuntimeError("`.data` of a view of a reparametrised LoRA's weight cannot be replaced; use `copy_`.")
    weight.source.prepared(values)()


def _trains(_: Any, weight: ComputedWeight) -> bool:
    """LoRA's weights are leaves, so whether they train does not depend on the mode."""
    return any(rows.requires_grad for rows in weight.source.coefficients())


def _set_trains(_: Any, weight: ComputedWeight, requires_grad: bool = True) -> ComputedWeight:
    for rows in weight.source.coefficients():
        rows.requires_grad_(requires_grad)
    return weight


def _no_gradient(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "The weight of a reparametrised LoRA is computed from coefficients, and these have the gradients: it has no "
        "`.grad` and no hooks of its own. Take `model.named_parameters()`, or `wara_peft.plain_lora(model)` first."
    )


def _read_only(function: Any, weight: ComputedWeight, *args: Any, **kwargs: Any) -> Any:
    """NumPy's view of the values, through which nothing can be written."""
    array = function(weight.values(), *args, **kwargs)
    array.flags.writeable = False
    return array


def _write_elements(function: Any, weight: ComputedWeight, *args: Any) -> ComputedWeight:
    """Write by a function of Python for each element, which takes memory and calls no operator."""
    whole = _present(weight.source)
    function(whole if weight.values_of_view is None else weight.values_of_view, *args)
    weight.source.prepared(whole)()
    return weight


def _at_an_address(function: Any, weight: ComputedWeight, *args: Any, **kwargs: Any) -> Any:
    """An answer about memory, which the values have from now on for as long as the weight is there."""
    weight.kept = weight.values()
    return function(weight.kept, *args, **kwargs)


def _of_values(function: Any, weight: ComputedWeight, *args: Any, **kwargs: Any) -> Any:
    return function(weight.values(), *args, **kwargs)


def _shared(_: Any, weight: ComputedWeight) -> ComputedWeight:
    """The weight, after its coefficients have moved to memory that processes share."""
    for rows in weight.source.coefficients():
        rows.share_memory_()  # type: ignore[no-untyped-call]
    return weight


def _is_shared(_: Any, weight: ComputedWeight) -> bool:
    return all(map(Tensor.is_shared, weight.source.coefficients()))


def _as_parameter(weight: ComputedWeight) -> nn.Parameter:
    return nn.Parameter(weight.values().clone(), weight.requires_grad)


def _copied(_: Any, weight: ComputedWeight, memo: dict[int, Any]) -> nn.Parameter:
    memo[id(weight)] = made = _as_parameter(weight)
    return made


def _pickled(_: Any, weight: ComputedWeight, protocol: Any) -> Any:
    return _as_parameter(weight).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


_ATTRIBUTES: Any = Tensor  # its attributes are descriptors, which type checkers take for values
_DTYPE = _ATTRIBUTES.dtype.__get__
_OF_LAYERS: dict[Any, Callable[..., Any]] = {
    _ATTRIBUTES.requires_grad.__get__: _trains,
    _ATTRIBUTES.requires_grad.__set__: _set_trains,
    Tensor.requires_grad_: _set_trains,
    **dict.fromkeys((_ATTRIBUTES.grad.__get__, _ATTRIBUTES.grad.__set__), _no_gradient),
    **dict.fromkeys(
        (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad), _no_gradient
    ),
}
_IN_PYTHON: dict[Any, Callable[..., Any]] = {
    _ATTRIBUTES.data.__set__: _set_data,
    **dict.fromkeys((Tensor.numpy, Tensor.__array__), _read_only),
    **dict.fromkeys(
        (Tensor.data_ptr, Tensor.untyped_storage, Tensor._typed_storage, Tensor.storage, Tensor.__dlpack__),
        _at_an_address,
    ),
    **dict.fromkeys((Tensor.apply_, Tensor.map_, Tensor.map2_), _write_elements),
    Tensor.share_memory_: _shared,
    Tensor.is_shared: _is_shared,
    **dict.fromkeys((Tensor.__repr__, Tensor.tolist, Tensor.__format__), _of_values),
    Tensor.__deepcopy__: _copied,
    Tensor.__reduce_ex__: _pickled,
}
