"""Checks that a training resumes with the weights and moments of its checkpoint, and loads weights that are not there.

transformers' `Trainer` loads a checkpoint by the names of its tensors, and only warns of names that a model lacks. So
a model whose tensors were renamed on saving would train on from its first weights, with the moments of others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from ...disk.checkpoints.checkpoint import Checkpoint, read_json
from ...factorized.key_names import missing_names, names_on_loading
from ...messages import first_few

TRAINER_STATE = "trainer_state.json"
ROUNDING = 1e-9
"""Sums of the same numbers differ at most by this share of Σ |x|, on other devices or with more or fewer threads."""
Mark = list[Any]
"""What is kept of a tensor: its shape, its sum and its norm."""


def marks_of(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Mark]]:
    """Give marks of a model's weights and buffers, and of the optimizer's moments, by their names."""
    kinds = {"weights": _weights(model), "moments": _moments(model, optimizer)}
    return {kind: {name: _mark(tensor) for name, tensor in found.items()} for kind, found in kinds.items()}


def check_resumed(
    model: nn.Module,
    optimizer: Any,
    marks: Mapping[str, Mapping[str, Mark]] | None,
    directories: list[Path],
    state: TrainerState,
) -> None:
    """Load the weights of a checkpoint, unless they are loaded, and refuse to go on if anything is not as it was.

    Args:
        model: the model as `Trainer` has it before the first step.
        optimizer: the optimizer, whose moments `Trainer` has loaded.
        marks: `marks_of` at the time of the checkpoint, or None if the checkpoint has no marks.
        directories: where the checkpoint may lie.
        state: the state that `Trainer` has loaded, which tells the checkpoint's directory from others.

    Raises:
        ValueError: weights, factors or moments are not those of the checkpoint.
    """
    if marks is None or _differences(marks["weights"], _weights(model)):
        directory = next((path for path in directories if _is_of(path, state)), None)
        if directory is not None:
            _load_weights(model, directory)
        elif marks is None:
            raise ValueError(
                f"The checkpoint of step {state.global_step} does not tell what its weights are, so nothing shows "
                "that they were loaded. Name its directory by TrainingArguments(resume_from_checkpoint=...)."
            )
    if marks is None:
        wrong = _misshapen(model, optimizer)
    else:
        wrong = _differences(marks["weights"], _weights(model))
        wrong += _differences(marks["moments"], _moments(model, optimizer), rounded=True)
    if wrong:
        raise ValueError(
            f"The training cannot go on from step {state.global_step}: {first_few(wrong)}. Resume from a complete "
            "checkpoint, with the model and the optimizer of the first run."
        )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if _has_values(tensor)}


def _moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Give the optimizer's tensors of each parameter, but those of one number, which count steps."""
    return {
        f"{name}: {key}": value
        for name, parameter in model.named_parameters()
        for key, value in getattr(optimizer, "state", {}).get(parameter, {}).items()
        if _has_values(value) and value.numel() > 1
    }


def _has_values(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and not isinstance(value, DTensor)


@torch.no_grad()
def _mark(tensor: Tensor) -> Mark:
    # Only floats have norms.
    norm = torch.linalg.vector_norm(tensor if tensor.is_floating_point() else tensor.double(), dtype=torch.float64)
    return [list(tensor.shape), float(tensor.sum(dtype=torch.float64)), float(norm)]


def _differences(marks: Mapping[str, Mark], found: Mapping[str, Tensor], rounded: bool = False) -> list[str]:
    """Say which tensors are not those of the marks. `rounded` allows for values that loading has rounded."""
    wrong = [f"{name!r} is missing" for name in marks if name not in found]
    for name, tensor in found.items():
        if name not in marks:
            wrong.append(f"{name!r} is not in the checkpoint")
            continue
        shape, *numbers = marks[name]
        if list(tensor.shape) != shape:
            wrong.append(f"{name!r} has the shape {tuple(tensor.shape)}, and {tuple(shape)} in the checkpoint")
            continue
        rounding = torch.finfo(tensor.dtype).eps if rounded and tensor.is_floating_point() else ROUNDING
        _, *own = _mark(tensor)
        # By Cauchy and Schwarz, Σ |x| is at most the norm times the square root of the number of values.
        most = rounding * max(1e-300, numbers[1] * math.sqrt(max(1, tensor.numel())))
        if not all(abs(a - b) <= most or (a != a and b != b) for a, b in zip(own, numbers, strict=True)):
            wrong.append(f"{name!r} has other values than in the checkpoint")
    return wrong


def _misshapen(model: nn.Module, optimizer: Any) -> list[str]:
    parameters = dict(model.named_parameters())
    found = []
    for name, moment in _moments(model, optimizer).items():
        shape = parameters[name.rpartition(": ")[0]].shape
        # Adafactor, for example, keeps vectors of rows and columns of a matrix.
        if moment.dim() == len(shape) > 1 and moment.shape != shape:
            found.append(f"{name!r} has the shape {tuple(moment.shape)}, and its parameter {tuple(shape)}")
    return found


def _is_of(directory: Path, state: TrainerState) -> bool:
    path = directory / TRAINER_STATE
    if not path.is_file():
        return False
    fields = read_json(path)
    return fields.get("global_step") == state.global_step and fields.get("log_history") == state.log_history


def _load_weights(model: nn.Module, directory: Path) -> None:
    """Load a checkpoint's weights into a model, in place and in the same parameters.

    Raises:
        ValueError: tensors are missing, have other names, or do not fit.
    """
    checkpoint = Checkpoint(directory)
    state = model.state_dict()
    names = {key: name for key, name in names_on_loading(model, checkpoint.tensors, state).items() if name in state}
    missing = missing_names(model, state, set(names.values()))
    if missing:
        raise ValueError(
            f"{str(directory)!r} has no {first_few([repr(name) for name in missing])} for the model. Resume from a "
            "complete checkpoint, with the model of the first run."
        )
    try:
        model.load_state_dict({name: checkpoint.read(key) for key, name in names.items()}, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{str(directory)!r} does not fit the model: {error}") from error
