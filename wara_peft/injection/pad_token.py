"""Warns of a padding token that will be another one when the adapter is loaded.

A decoder with a score finds by this token where to read the score. It is a setting of the base model, and so is not
saved with the adapter.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftConfig
from torch import nn

from ..layers.lookup import base_model_of
from .saved_besides_factors import base_config_on_disk


def warn_of_pad_token(model: nn.Module, config: PeftConfig) -> None:
    """Warn if the base model on disk reads its scores at other tokens than the model whose adapter is being saved.

    A decoder with a `score` reads it at the last token that is not `config.pad_token_id`. A trainer may have changed
    this setting: if the tokenizer has no padding token, TRL's `RewardTrainer` sets it to the token that ends a text.
    PEFT saves no settings of the base model. Whoever loads the adapter beside the base model on disk gets the old
    setting, and other scores.

    Args:
        model: the model with the adapter.
        config: the adapter's config, which names the base model.
    """
    name = config.base_model_name_or_path
    base = base_model_of(model)
    if config.task_type != "SEQ_CLS" or not name or not hasattr(base, "score"):
        return
    here: Any = getattr(base, "config", None)
    on_disk = base_config_on_disk(here, name)
    if on_disk is None:
        return
    used, saved = (found.get_text_config().pad_token_id for found in (here, on_disk))
    if used != saved:
        warnings.warn(
            f"This model reads its scores at the last token that is not pad_token_id={used}; its base {name!r} is "
            f"saved with pad_token_id={saved}, and would read them elsewhere. Load the base of this adapter with "
            f"`AutoModelForSequenceClassification.from_pretrained(..., pad_token_id={used})`."
        )
