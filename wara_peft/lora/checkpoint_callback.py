"""A callback of transformers' `Trainer` that adds an exact LoRA to each checkpoint; it loads without this package."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import WaRAConfig
from ..registration import NAME
from .export import save_as_lora

FOLDER = "as_lora"


class SaveAsLora(TrainerCallback):
    """Writes an exact LoRA of each WaRA adapter in a checkpoint, to checkpoint-N/as_lora/<adapter>/.

    PEFT loads this LoRA in programs that never import `wara_peft`: `PeftModel.from_pretrained(base,
    "out/checkpoint-100/as_lora/default")`. The process that wrote the checkpoint makes the LoRA from its complete
    files, so the LoRA does not depend on how the model is distributed. It lies two levels deep, because `Trainer`
    resumes every direct subfolder of a checkpoint that has an adapter's file as one more adapter.

    Raises:
        ValueError: when training begins: the model has no WaRA adapter, one has no ΔW (`form="grid"`), or the training
            is a trial of a hyper-parameter search, whose checkpoints lie elsewhere. When a checkpoint is saved: see
            `save_as_lora`.

    Example:
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[wara_peft.SaveAsLora()])  # doctest: +SKIP
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse, before training starts, a model whose checkpoints could not be saved as LoRA."""
        if state.is_hyper_param_search:
            raise ValueError("SaveAsLora is not for hyper-parameter search: train the best run with it.")
        configs = {
            name: config
            for name, config in getattr(model, "peft_config", {}).items()
            if isinstance(config, WaRAConfig)
        }
        if not configs:
            raise ValueError("SaveAsLora found no WaRA adapter in the model that is to be trained.")
        for name, config in configs.items():
            if not config.form_object.has_delta_weight:
                raise ValueError(
                    f"Adapter {name!r} has form={config.form!r}, which is no LoRA: train it without SaveAsLora."
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the LoRAs of the checkpoint that was just saved, in the process that saved it."""
        # Every process gets this event, and one of them (or one a node) writes.
        if not args.should_save:
            return
        checkpoint = Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        # From files and not from `model`: under FSDP or DeepSpeed a process has only parts of the parameters.
        saved = list(_wara_adapters(checkpoint))
        for name, directory in saved:
            save_as_lora(checkpoint / FOLDER / name, directory)
        if not saved:
            warnings.warn(
                f"{str(checkpoint)!r} holds no WaRA adapter in one piece, and gets no LoRA. Sharded state is not "
                "saved as an adapter: let FSDP save FULL_STATE_DICT."
            )


def _wara_adapters(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """Find the WaRA adapters in a checkpoint: name and directory of each.

    PEFT saves the adapter "default" in the checkpoint itself, and every other one in a folder of its name.
    """
    folders = sorted(path for path in checkpoint.iterdir() if path.is_dir()) if checkpoint.is_dir() else []
    for directory in (checkpoint, *folders):
        config = directory / CONFIG_NAME
        has_weights = any((directory / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
        if has_weights and config.is_file() and _peft_type(config) == NAME:
            yield "default" if directory == checkpoint else directory.name, directory


def _peft_type(config: Path) -> Any:
    return json.loads(config.read_text(encoding="utf-8")).get("peft_type")
