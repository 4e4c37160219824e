"""State dicts of compressed models that are not transformers', such as those of timm, diffusers and plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ... import attention  # noqa: F401  # lets `put_in_place` know of attentions
from ...arguments import check_argument
from ...compiled import on_plain_model
from ...factorized.marks import MARK
from ...factorized.saved import FACTORIZED, put_in_place
from ...messages import first_few


@on_plain_model
def load_factorized(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Put factorised layers into a dense model, in place, and load the state dict of a compressed one.

    The names and shapes of the tensors tell which layers are factorised, and with which ranks. The new layers get the
    device, dtype and `requires_grad` of those that they replace. Models of transformers do not need this: their
    `from_pretrained` does it.

    Args:
        model: a dense model of the same architecture as the compressed one.
        state_dict: what `compressed.state_dict()` gives, which `torch.save` or `safetensors` may have written.

    Returns:
        Names of the factorised layers.

    Raises:
        ValueError: the state dict has no factors, or lacks tensors, has others, or has wrong shapes; or the model is
            on the meta device. The model then is as it was.
    """
    call = "load_factorized(model, state_dict)"
    check_argument(call, "model", model, "an nn.Module")
    check_argument(call, "state_dict", state_dict, "a mapping")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "The model is on the meta device and has no memory for values. Call model.to_empty(device=...) before."
        )
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if isinstance(value, Tensor)}
    with _restored_on_error(model) as places:
        names = put_in_place(model, shapes)
        if not names:
            raise ValueError(
                f"The state dict has no factors for a layer of {type(model).__name__}: its keys are "
                f"{first_few([repr(key) for key in state_dict])}. Load dense weights by model.load_state_dict."
            )
        for parent, name, old in places:
            new = parent._modules[name]
            weight = next(old.parameters(), None)
            if new is not None and new is not old and weight is not None:
                new.to(weight.device, weight.dtype).requires_grad_(weight.requires_grad)
        _check_tensors(model, state_dict, shapes)
    model.load_state_dict(state_dict)
    return names


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[list[tuple[nn.Module, str, nn.Module]]]:
    """Put all layers back where they were if the block raises. It gets each with its parent and its name there."""
    # `named_children` leaves out further names of a shared module, so the private mapping is read.
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
    nested = [(module, module.use_nested_tensor) for module in model.modules() if hasattr(module, "use_nested_tensor")]
    try:
        yield places
    except BaseException:
        for parent, name, child in places:
            setattr(parent, name, child)
        for encoder, uses in nested:
            encoder.use_nested_tensor = uses
        raise


def _check_tensors(model: nn.Module, state_dict: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    state = model.state_dict()
    marks = {
        f"{name}.weight"
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, FACTORIZED)
    }
    wrong = [f"it lacks {name!r}" for name in state if name not in state_dict]
    wrong += [
        f"it has {key!r}, and the model has not"
        for key in state_dict
        if key not in state and not (key in marks and shapes.get(key) == MARK)
    ]
    wrong += [
        f"{name!r} has the shape {shapes[name]}, and {tuple(value.shape)} in the model"
        for name, value in state.items()
        if isinstance(value, Tensor) and name in shapes and shapes[name] != tuple(value.shape)
    ]
    if wrong:
        raise ValueError(f"The state dict does not fit {type(model).__name__}: {first_few(wrong)}.")
