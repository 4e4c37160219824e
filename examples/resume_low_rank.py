"""Convert a dense model, train it under transformers' Trainer, kill that, resume it and save it compressed, offline.

    python examples/resume_low_rank.py
    python examples/resume_low_rank.py --method Maestro

A small dense Llama is written to --output-dir. A process of its own converts it, trains it on blocks of docstrings and
saves it by `save_compressed`. A second one does the same and is killed (SIGKILL) between two checkpoints; a third one
with the same arguments goes on from the last checkpoint. Both results are read by `load_compressed` and compared: they
must be equal to the bit, in all parameters and buffers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import torch
from low_rank_tasks import LanguageModel
from safetensors.torch import load_file, save_file
from study_options import stop
from torch import nn
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from wara_peft.compression import (
    OrderedRankTraining,
    TrainedRankPruning,
    factorize,
    load_compressed,
    low_rank_plus_sparse,
    ordered_low_rank,
    save_compressed,
)

BLOCKS, STEPS, SAVE_STEPS, KILLED_AFTER = 64, 24, 6, 10
LAYERS = LanguageModel.layers


@dataclass(frozen=True)
class Method:
    """What converts the dense model, and what Trainer's callback is."""

    convert: Callable[[nn.Module], object] = lambda model: None
    callback: Callable[[], TrainerCallback] | None = None


METHODS = {
    "low-rank": Method(lambda model: factorize(model, 16, "random", LAYERS)),
    "SLTrain": Method(lambda model: low_rank_plus_sparse(model, 14, 0.03, LAYERS)),
    # So high a threshold, and so low a share of energy, that a few steps are enough to reach ranks that pay.
    "Maestro": Method(
        lambda model: ordered_low_rank(model, target_modules=LAYERS),
        lambda: OrderedRankTraining(penalty=1e-4, threshold=6.0),
    ),
    "TRP": Method(callback=lambda: TrainedRankPruning(energy=0.5, target_modules=LAYERS)),
}


class Say(TrainerCallback):
    """Tells who started this process how far it is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"step {state.global_step}", flush=True)


def train(folder: Path, method: Method, run: str) -> None:
    """What each process does: convert, train from the last checkpoint on, and save."""
    model = LlamaForCausalLM.from_pretrained(folder / "dense")
    torch.manual_seed(0)
    method.convert(model)
    blocks = load_file(folder / "blocks.safetensors")["blocks"]
    arguments = TrainingArguments(
        str(folder / run),
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    callbacks = [Say(), *([method.callback()] if method.callback else [])]
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    # Trainer writes this file last: a checkpoint that has it is whole.
    whole = sorted(folder.glob(f"{run}/checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if whole:
        print(f"resumes {whole[-1].parent.name}", flush=True)
    trainer.train(resume_from_checkpoint=str(whole[-1].parent) if whole else None)
    save_compressed(model, folder / f"{run}-saved", overwrite=True)


def start(args: argparse.Namespace, run: str, kill: bool = False) -> None:
    """Train in a process of its own, and kill that when some steps are done."""
    command = [sys.executable, __file__, "--method", args.method, "--output-dir", str(args.output_dir), "--run", run]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("resumes"):
                print(f"A fresh process {line.strip()}")
            if kill and line.strip() == f"step {KILLED_AFTER}":
                process.send_signal(signal.SIGKILL)
    if kill and process.returncode != -signal.SIGKILL:
        stop(f"the training was to be killed, and ended with status {process.returncode}")
    if not kill and process.returncode:
        stop(f"the training ended with status {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--method", choices=list(METHODS), default="SLTrain", help="(default: %(default)s)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("resume_low_rank_output"), help="(default: %(default)s)"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)  # for the processes that are started
    args = parser.parse_args()
    logging.disable_progress_bar()
    folder: Path = args.output_dir
    if args.run:
        train(folder, METHODS[args.method], args.run)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--output-dir {folder} cannot be used as a folder: {error.strerror}")
    for run in ("whole", "killed"):  # of an earlier time
        shutil.rmtree(folder / run, ignore_errors=True)
    task = LanguageModel()
    torch.manual_seed(0)
    task.new_model().save_pretrained(folder / "dense")
    save_file({"blocks": task.splits["train"][0][:BLOCKS].contiguous()}, folder / "blocks.safetensors")

    start(args, "whole")
    print(f"Converted by {args.method}, trained for {STEPS} steps and saved")
    start(args, "killed", kill=True)
    print(f"The same, killed after step {KILLED_AFTER}")
    start(args, "killed")
    expected, found = (load_compressed(folder / f"{run}-saved").state_dict() for run in ("whole", "killed"))
    differ = [name for name in {**expected, **found} if name not in found or name not in expected]
    differ += [name for name in expected.keys() & found.keys() if not torch.equal(expected[name], found[name])]
    if differ:
        stop(f"{len(differ)} tensors are not what they are without an interruption, {sorted(differ)[0]} among them")
    numbers = sum(tensor.numel() for tensor in found.values())
    print(f"Both load by load_compressed, and all {numbers:,} numbers of {len(found)} tensors are equal to the bit")


if __name__ == "__main__":
    main()
