"""Lets transformers load models with factorised layers, wherever it calls `from_pretrained`.

Transformers asks the quantizer that `config.json` names to prepare a model before it reads the weights. This one
replaces the dense layers by the factorised layers that the files have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ... import attention  # noqa: F401  # lets `put_in_place` know of attentions
from ...factorized.marks import METHOD
from ...factorized.saved import name_tensors, put_in_place
from .tensors import TensorFile

AUTO_QUANTIZER_MAPPING.pop(METHOD, None)  # transformers refuses a method twice, also after a reload


@register_quantizer(METHOD)
class FactorizedQuantizer(HfQuantizer):
    """Puts factorised layers in place before transformers loads their tensors. It quantizes nothing."""

    is_trainable = True
    """What transformers asks of a quantizer; a loaded model no longer has one."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise ValueError(
                "Only safetensors tell which layers of a compressed model are factorised, and transformers gives "
                f"{[file.name for file in files] or 'no files'}. Pass the directory to from_pretrained, or a state "
                "dict to wara_peft.compression.load_factorized."
            )
        put_in_place(model, {key: info.shape for file in files for key, info in TensorFile(file).tensors.items()})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # The layers train, change their dtype and compile as dense ones do, which transformers would not let a
        # quantized model do.
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        # `from_pretrained` has noted conversions for saving, and this quantizer's config must be saved too.
        name_tensors(model)

    def is_serializable(self) -> bool:
        return True
