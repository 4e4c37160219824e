"""Compressing a model block by block, in stages of which each step is done once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ...calibration.batches import groups_within
from ...disk.checkpoints.checkpoint import copy_beside, read_json
from ...disk.checkpoints.directory import file_written_at_once, written_at_once
from ...disk.checkpoints.tensors import TensorFile
from ...factorized.marks import MARK
from ...factorized.saved import FACTORIZED, put_in_place
from ..compress import Plan
from ..replacement import Replacement, layers_by_input, replace_everywhere
from ..report import CompressionReport
from ..solvers.needed_statistics import empty_statistics, statistics_of
from ..solvers.solve import factorize_weight
from ..statistics.collect import bytes_needed, measure, warn_of_few
from ..statistics.layer_statistics import LayerStatistics
from ..targets import factorizable_weight
from .block_calls import BlockModel
from .blockwise_model import BlockwiseModel, RestModel
from .model import write_record
from .stored_inputs import FILE, StoredInputs, store_calls

T = TypeVar("T")
Layers = dict[str, nn.Linear | Conv1D]
Entry = LayerStatistics
Lost = dict[str, float]
"""Errors of factorised layers by name."""
INPUTS = ("inputs",)
LOST = "lost"
"""Entry in the metadata of a block's file with the errors of its layers."""


@dataclasses.dataclass
class Run:
    """One call of `compress_by_block`, with arguments that are checked.

    The number of a block stands for its layers; the number after the last block stands for the layers outside of the
    blocks, such as a pooler. A stage, "gains" or "factors", is one way through all of them.
    """

    directory: Path
    empty: PreTrainedModel
    plan: Plan
    place: str
    work: Path
    is_measuring: bool
    sequential: bool
    max_bytes: int
    device: str

    def to_end(self, batches: Iterable[Any], temporary: Path, show_progress_bar: bool) -> CompressionReport:
        """Do what is not done yet, and write the model into a directory."""
        model = self._model()
        self.calls = self.work / "calls"
        if self.is_measuring and not any(self.calls.glob("*")):
            with written_at_once(self.calls) as folder:
                store_calls(model, batches, folder)
        model.release()
        self.count = len(model.blocks)
        parts = self.count + bool(self._names(self.count))
        gains = [self.work / f"gains-{number:05d}.json" for number in range(parts if self.plan.needs_gains else 0)]
        blocks = [self.work / f"block-{number:05d}.safetensors" for number in range(self.count)]
        done = sum(map(_is_written, [*gains, *blocks]))
        total, lost = len(gains) + len(blocks), Lost()
        with tqdm(total=total, initial=done, desc="Blocks", disable=not show_progress_bar) as self.progress:
            for number, record in enumerate(gains):
                self._add_gains(model, number, record)
            self.ranks = self.plan.ranked()
            for number, record in enumerate(blocks):
                lost |= self._block(model, number, record)
        return self._finish(model, lost, blocks, temporary)

    def _model(self) -> BlockwiseModel:
        return BlockwiseModel(self.empty, self.directory, self.place, self.work / "converted", self.device)

    def _names(self, number: int) -> list[str]:
        """Give the names of the targets in a block, or outside of all blocks."""
        if number < self.count:
            return [name for name in self.plan.targets if name.startswith(f"{self.place}.{number}.")]
        return [name for name in self.plan.targets if not name.startswith(f"{self.place}.")]

    def _part(self, model: BlockwiseModel, number: int) -> tuple[nn.Module, BlockModel | RestModel, Layers]:
        """Read a block, or what lies outside of all blocks; give it, a module that runs it, and its targets."""
        part: nn.Module
        runner: BlockModel | RestModel
        if number < self.count:
            part = model.load(number)
            runner, prefix = BlockModel(part), f"{self.place}.{number}."
        else:
            rest = self._model()
            part, runner, prefix = cast(nn.Module, rest.model), RestModel(rest), ""
        layers: Layers = {}
        for name in self._names(number):
            layers[name] = cast(Any, part.get_submodule(name.removeprefix(prefix)))
            factorizable_weight(name, layers[name])
        return part, runner, layers

    def _inputs(self, stage: str, number: int) -> StoredInputs:
        hidden = self.work / f"{stage}-{number:05d}" if number else None
        return StoredInputs(self.calls, torch.device(self.device), number, hidden)

    @contextmanager
    def _keeping(self, runner: BlockModel | RestModel, stage: str, number: int) -> Iterator[None]:
        """Context in which a run of a block through all batches writes the inputs of the next one."""
        if isinstance(runner, RestModel) or (number + 1 == self.count and not self._names(self.count)):
            yield
            return
        with written_at_once(self.work / f"{stage}-{number + 1:05d}", "replace") as folder:
            files = (folder / FILE.format(index) for index in itertools.count())
            runner.keep = lambda hidden: torch.save(hidden.clone(), next(files))
            try:
                yield
            finally:
                runner.keep = None

    def _solved(
        self, runner: BlockModel | RestModel, layers: Layers, stage: str, number: int, solve: Callable[[str, Entry], T]
    ) -> dict[str, T]:
        """Measure the dense layers of a part, solve for each one, and write the inputs of the next block.

        A layer's statistics are forgotten when its group is done.
        """
        if not self.is_measuring:
            return {name: solve(name, empty_statistics(layer)) for name, layer in layers.items()}
        inputs = self._inputs(stage, number)
        # Layers with the same inputs, such as q, k and v, have one sum.
        groups = layers_by_input(runner, layers, next(iter(inputs)))
        groups += [[name] for name in layers if not any(name in group for group in groups)]
        needed = {group[0]: bytes_needed(layers[group[0]], INPUTS) for group in groups}
        solved: dict[str, T] = {}
        for leaders in groups_within(self.max_bytes, needed):
            chosen = {name: layers[name] for group in groups if group[0] in leaders for name in group}
            with nullcontext() if solved else self._keeping(runner, stage, number):
                found = measure(runner, chosen, inputs, INPUTS)
            for name, layer in chosen.items():
                solved[name] = solve(name, statistics_of(name, layer, found, self.plan.method))
            if number == 0:  # all blocks see the same positions
                warn_of_few(found)
            del found  # before the next group is measured
        return solved

    def _add_gains(self, model: BlockwiseModel, number: int, record: Path) -> None:
        """Tell the plan what ranks of the layers of a part gain, from the file that keeps this."""
        if not _is_written(record):
            _, runner, layers = self._part(model, number)

            def gains(name: str, entry: Entry) -> tuple[int, list[float]]:
                return entry.count, self.plan.gains(factorizable_weight(name, layers[name]), entry)

            found = self._solved(runner, layers, "gains", number, gains)
            with file_written_at_once(record, "replace") as file:
                file.write_text(json.dumps(found), encoding="utf-8")
            self._end("gains", number)
        for name, (positions, gained) in read_json(record).items():
            self.plan.add(name, positions, self.is_measuring, gained)

    def _factorize(self, part: nn.Module, runner: BlockModel | RestModel, layers: Layers, number: int) -> Lost:
        """Replace the layers of a part by factorised ones, and write the inputs of the next block."""
        layers = {name: layer for name, layer in layers.items() if name in self.ranks}
        ranks = {name: self.ranks[name] for name in layers}
        method = self.plan.method
        if self.sequential:
            inputs = self._inputs("factors", number)
            lost = Replacement(runner, layers, ranks, method, {}).in_order(inputs, None, lambda: None)
            with self._keeping(runner, "factors", number):
                measure(runner, {}, inputs, INPUTS)
            return lost
        made = self._solved(
            runner,
            layers,
            "factors",
            number,
            lambda name, entry: factorize_weight(layers[name], ranks[name], method, entry),
        )
        replace_everywhere(part, {layers[name]: solution.layer for name, solution in made.items()})
        return {name: solution.lost for name, solution in made.items()}

    def _block(self, model: BlockwiseModel, number: int, record: Path) -> Lost:
        """Write the file of a factorised block, unless it is there; give the errors of its layers."""
        if not _is_written(record):
            block, runner, layers = self._part(model, number)
            lost = self._factorize(block, runner, layers, number)
            tensors = _tensors_of(block, f"{self.place}.{number}.")
            with file_written_at_once(record, "replace") as file:
                save_file(tensors, file, metadata={"format": "pt", LOST: json.dumps(lost)})
            self._end("factors", number)
        return cast(Lost, json.loads(TensorFile(record).metadata[LOST]))

    def _end(self, stage: str, number: int) -> None:
        """Remove the inputs of a part that is done."""
        self.progress.update()
        shutil.rmtree(self.work / f"{stage}-{number:05d}", ignore_errors=True)

    def _finish(self, model: BlockwiseModel, lost: Lost, files: list[Path], directory: Path) -> CompressionReport:
        """Write the model: what lies outside of the blocks, the files of the blocks, and what tells of both."""
        whole, runner, layers = self._part(model, self.count)
        whole = cast(PreTrainedModel, whole)
        if layers:
            lost = lost | self._factorize(whole, runner, layers, self.count)
        report = self.plan.report(lost, self.sequential)
        with torch.device("meta"):
            shapes = {key: info.shape for file in files for key, info in TensorFile(file).tensors.items()}
            put_in_place(whole, shapes)
        cast(Any, whole).compression_report = report
        copy_beside(self.directory, directory)
        outside = {name: tensor for name, tensor in whole.state_dict().items() if not tensor.is_meta}
        cast(Any, whole).save_pretrained(directory, state_dict=outside)
        for file in directory.glob("*.safetensors"):
            file.rename(file.with_stem(f"outside-{file.stem}"))
        for file in files:
            os.link(file, directory / file.name)
        _write_index(directory)
        write_record(whole, directory)
        return report


def _is_written(file: Path) -> bool:
    # A process that is killed while it writes leaves an empty file.
    return file.is_file() and file.stat().st_size > 0


def _tensors_of(block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Give the tensors of a factorised block by the names that transformers gives them, with marks."""
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in block.state_dict().items()}
    for name, layer in block.named_modules():
        if isinstance(layer, FACTORIZED):
            tensors[f"{prefix}{name}.weight"] = next(layer.parameters()).detach().new_empty(MARK)
    return tensors


def _write_index(directory: Path) -> None:
    files = {file.name: TensorFile(file).tensors for file in sorted(directory.glob("*.safetensors"))}
    size = sum((directory / name).stat().st_size for name in files)
    index = {"metadata": {"total_size": size}, "weight_map": {key: name for name in files for key in files[name]}}
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
