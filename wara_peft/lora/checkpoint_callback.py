"""A callback of transformers' `Trainer` that gives each checkpoint an exact LoRA, which loads without this package."""

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
    """Writes checkpoint-N/as_lora/<adapter>/, an exact LoRA of each WaRA adapter that the checkpoint holds.

    Any PEFT loads it, in programs that never import `wara_peft`: `PeftModel.from_pretrained(base,
    "out/checkpoint-100/as_lora/default")`. It is made from the checkpoint's own files, after these are complete, by
    the process that wrote them, so how the model is distributed does not matter. It lies two levels deep, since
    `Trainer` takes any folder of a checkpoint with an adapter's file in it for one more adapter when it resumes.

    Raises:
        ValueError: when training begins: the model has no WaRA adapter, one has no ΔW (`form="grid"`), or it is a
            search for hyper-parameters, whose checkpoints lie elsewhere. When a checkpoint is saved: see
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
        """Find out now what could not be saved later."""
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
        if not args.should_save:
            return
        checkpoint = Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        saved = list(_wara_adapters(checkpoint))
        for name, directory in saved:
            save_as_lora(checkpoint / FOLDER / name, directory)
        if not saved:
            warnings.warn(
                f"{str(checkpoint)!r} holds no WaRA adapter in one piece, and gets no LoRA. Sharded state is not "
                "saved as an adapter: let FSDP save FULL_STATE_DICT."
            )


def _wara_adapters(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """Name and directory of each: PEFT saves "default" in the checkpoint itself, others in folders of their names."""
    folders = sorted(path for path in checkpoint.iterdir() if path.is_dir()) if checkpoint.is_dir() else []
    for directory in (checkpoint, *folders):
        config = directory / CONFIG_NAME
        has_weights = any((directory / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
        if has_weights and config.is_file() and _peft_type(config) == NAME:
            yield "default" if directory == checkpoint else directory.name, directory


def _peft_type(config: Path) -> Any:
    return json.loads(config.read_text(encoding="utf-8")).get("peft_type")
