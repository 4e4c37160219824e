"""A saved model with the weights of one block in memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...calibration.batches import run_model
from ...messages import first_few
from .block_calls import REMEDY, Call, hidden_of, with_hidden


def block_list(model: PreTrainedModel, targets: Iterable[str], place: str | None) -> str:
    """Give the name of the model's list of blocks, a `ModuleList` of modules of one class.

    Args:
        model: the model, whose weights may be on the meta device.
        targets: names of the layers to compress. Without `place`, some of them must lie in the list.
        place: the name, if the model has several such lists.

    Raises:
        ValueError: there is no such list or there are several, `place` names none, or the model has an encoder and a
            decoder.
    """
    kind = type(model).__name__
    found: dict[str, nn.ModuleList] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    }
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{kind} has an encoder and a decoder, and goes not block by block: a decoder's blocks get more than the "
            "blocks before them give. Load the model, and call calibrate and compress."
        )
    if place is not None:
        if place not in found:
            raise ValueError(
                f"blocks={place!r} is no ModuleList of modules of one class in {kind}; "
                f"{first_few([repr(name) for name in found]) or 'no module'} is."
            )
        return place
    # A list inside a block, such as one of experts, is a part of the block.
    outer: list[str] = [
        name
        for name in found
        if not any(name.startswith(f"{other}.") for other in found)
        and any(target.startswith(f"{name}.") for target in targets)
    ]
    if len(outer) != 1:
        which = first_few([repr(name) for name in outer])
        remedy = "name one (blocks=...)" if outer else "load the model, and call calibrate and compress"
        raise ValueError(
            f"{kind} has {f'several lists of blocks, {which}' if outer else 'no list of blocks with targets'}, and "
            f"goes block by block through one: {remedy}."
        )
    return outer[0]


class BlockwiseModel:
    """A model of a checkpoint with only what lies outside of its blocks in memory, until `release`.

    transformers loads it, so names and conversions of tensors are its own. The blocks stay on the meta device, and
    `load` reads the tensors of one.

    Args:
        empty: the same model on the meta device.
        directory: the checkpoint.
        place: name of the list of blocks.
        converted: folder for tensors that transformers converts on loading, as it does with experts.
        device: where the model runs.

    Raises:
        ValueError: the checkpoint lacks tensors.
    """

    def __init__(self, empty: PreTrainedModel, directory: Path, place: str, converted: Path, device: str) -> None:
        self.place, self.device = place, torch.device(device)
        with _quiet("accelerate.big_modeling"):  # it warns that the blocks are on the meta device
            model, info = cast(Any, type(empty)).from_pretrained(
                directory,
                local_files_only=True,
                use_safetensors=True,
                device_map=_device_map(empty, place, device),
                offload_folder=str(converted),
                output_loading_info=True,
            )
        if info["missing_keys"]:
            missing = first_few([repr(str(key)) for key in sorted(info["missing_keys"])])
            raise ValueError(f"{str(directory)!r} lacks {missing}. Use a complete copy of the model.")
        self.blocks = cast(nn.ModuleList, model.get_submodule(place))
        maps = [getattr(getattr(part, "_hf_hook", None), "weights_map", None) for part in self.blocks.modules()]
        self._stored: Mapping[str, Tensor] = next(found.dataset for found in maps if found is not None)
        remove_hook_from_submodules(model)
        vars(model).pop("hf_device_map", None)  # by which transformers looks for hooks when it saves the model
        for module in model.modules():
            vars(module).pop("forward", None)  # accelerate leaves the class's forward there
        self.model: PreTrainedModel | None = model
        self._output: Any = None

    def release(self) -> None:
        """Forget what lies outside of the blocks."""
        self.model = None

    def load(self, number: int) -> nn.Module:
        """Make a copy of a block with its tensors."""
        block = copy.deepcopy(self.blocks[number])
        vars(block).pop("forward", None)
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            value = self._stored[f"{self.place}.{number}.{name}"] if tensor.is_meta else tensor
            set_module_tensor_to_device(block, name, self.device, value=value)
        return block

    @contextmanager
    def calling(self, step: Callable[[int, Call, Tensor], Tensor]) -> Iterator[None]:
        """Context in which calls of the blocks give the result of `step`, and no block runs.

        `step` gets the number of the block, its call and its hidden states, and gives hidden states.
        """
        latest: list[Tensor] = []

        def run(number: int, *args: Any, **kwargs: Any) -> Any:
            call, hidden = Call.of(f"{self.place}.{number}", args, kwargs)
            if number and not (latest and hidden is latest[0]):
                raise ValueError(f"The model changes hidden states before '{self.place}.{number}'. {REMEDY}")
            if self._output is None:
                self._output = call(self.load(number), hidden)
                hidden_of(self._output)
            latest[:] = [step(number, call, hidden)]
            return with_hidden(self._output, latest[0])

        # Blocks would get a cache of keys and values, and fill it.
        cached = [
            module.config
            for module in cast(nn.Module, self.model).modules()
            if isinstance(module, PreTrainedModel) and getattr(module.config, "use_cache", False)
        ]
        try:
            for config in cached:
                config.use_cache = False
            for number, block in enumerate(self.blocks):
                vars(block)["forward"] = partial(run, number)
            yield
        finally:
            for config in cached:
                config.use_cache = True
            for block in self.blocks:
                vars(block).pop("forward", None)

    def calls(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, list[Call]]:
        """Run what lies before the blocks; give the first block's hidden states, and the call of each block.

        What comes after the blocks runs for the first batch only, to see that it calls no block.

        Raises:
            ValueError: a block does not run exactly once.
        """
        found: dict[int, list[Call]] = {number: [] for number in range(len(self.blocks))}
        is_first = self._output is None
        first: list[Tensor] = []

        def note(number: int, call: Call, hidden: Tensor) -> Tensor:
            found[number].append(call)
            first.append(hidden)
            if number == len(self.blocks) - 1 and not is_first:
                raise _AfterBlocks
            # A copy, so that the next block's arguments show whether it gets what this one gives.
            return hidden.clone()

        with suppress(_AfterBlocks), self.calling(note):
            run_model(cast(nn.Module, self.model), kwargs or args)
        for number, calls in found.items():
            if len(calls) != 1:
                raise ValueError(f"'{self.place}.{number}' runs {len(calls)} times in a batch, not once. {REMEDY}")
        return first[0], [calls[0] for calls in found.values()]


class _AfterBlocks(Exception):
    """Ends a run of the model when its blocks are through."""


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Context without the warnings of a logger."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


def _device_map(model: nn.Module, place: str, device: str) -> dict[str, str]:
    """Give the device of each part of a model: "disk" for the blocks."""
    found = {place: "disk"}
    *above, own = place.split(".")
    for depth, name in enumerate([*above, own]):
        parent = model.get_submodule(".".join(above[:depth]))
        tensors = [*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False)]
        parts = [part for part, _ in [*parent.named_children(), *tensors] if part != name]
        found |= {".".join([*above[:depth], part]): device for part in parts}
    return found


class RestModel(nn.Module):
    """Runs a model with the hidden states that its last block gives, in place of the blocks.

    Its batches are those of `StoredInputs` with the number of blocks as their number.
    """

    main_input_name = "hidden"

    def __init__(self, whole: BlockwiseModel) -> None:
        super().__init__()
        self.model = whole.model
        self._calling, self._last = whole.calling, len(whole.blocks) - 1

    def forward(self, hidden: Tensor, call: Call, attention_mask: Tensor | None = None) -> None:
        def step(number: int, _: Call, passed: Tensor) -> Tensor:
            return hidden if number == self._last else passed.clone()

        with self._calling(step):
            run_model(cast(nn.Module, self.model), call.kwargs or call.args)
