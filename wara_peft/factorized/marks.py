"""Marks in the files of a model with factorised layers: nothing that only knows dense layers loads such files.

`config.json` gets a `quantization_config`, so that transformers calls our quantizer. Without this package transformers
only warns of an unknown method, draws random weights for dense layers, and goes on. So the files also have an empty
tensor under the name of each dense weight. A loader that looks for the weight finds one of a wrong shape, and stops.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..dequantized import unmark_dequantized

METHOD = "wara_peft"
"""What transformers names when it does not know the method: the package to import."""
MARK = (0,)
"""Shape of the tensor that files have in place of a dense weight."""

AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)  # transformers refuses a method twice, also after a reload


@register_quantization_config(METHOD)
class FactorizedConfig(QuantizationConfigMixin):
    """Entry of `config.json` for models with factorised layers. The tensors tell which layers these are."""

    def __init__(self, **_: Any) -> None:
        super().__init__(METHOD)  # type: ignore[arg-type]  # transformers has an enum for its own methods

    def get(self, name: str, default: Any = None) -> Any:
        """Give an attribute. `from_pretrained(path, config=model.config)` reads the entry as if it came from JSON."""
        return getattr(self, name, default)


def quantization_of(config: PreTrainedConfig) -> Any:
    """Give the entry about quantization in the config of a model, or None if it is our mark or there is none."""
    entry = getattr(config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return None if method == METHOD else entry


class WriteMark(ConversionOps):
    """Adds the mark of a factorised layer when transformers writes one of the layer's tensors.

    Args:
        part: name of this tensor in the layer.
        kinds: classes of factorised layers.
    """

    def __init__(self, part: str, kinds: tuple[type[nn.Module], ...]) -> None:
        self.part, self.kinds = part, kinds

    def convert(self, input_dict: dict[str, Any], *_: Any, **kwargs: Any) -> dict[str, Any]:
        key, model = kwargs["full_layer_name"], kwargs["model"]
        tensor = next(iter(input_dict.values()))
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        layer = key.removesuffix(f".{self.part}")
        if layer == key or not isinstance(model.get_submodule(layer), self.kinds):
            return {key: tensor}
        return {key: tensor, f"{layer}.weight": tensor.new_empty(MARK)}

    @property
    def reverse_op(self) -> WriteMark:
        return self


def mark_files(model: nn.Module, parts: set[str], kinds: tuple[type[nn.Module], ...]) -> None:
    """Let `save_pretrained` of a model and of its submodels write marks, and tensors under their names in the model.

    See `write_names_of_modules` for why the names are those. Dense models are written as transformers does it.

    Args:
        model: any module. Models of transformers in it are marked if they have factorised layers.
        parts: names of tensors, of which each factorised layer has exactly one.
        kinds: classes of factorised layers.
    """
    unmark_dequantized(model)
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    factorized = [module for module in models if any(isinstance(layer, kinds) for layer in module.modules())]
    # A dense body may have the same config as the model with its factorised head, so marks come after unmarking.
    for module in models:
        if _is_ours(vars(module).get("_weight_conversions")):
            del vars(module)["_weight_conversions"]
        if "quantization_config" in vars(module.config) and quantization_of(module.config) is None:
            del module.config.quantization_config
    for module in factorized:
        # Saving undoes the conversions of loading, in place of which it gets these.
        vars(module)["_weight_conversions"] = [_writing(part, kinds) for part in sorted(parts)]
        if quantization_of(module.config) is None:
            module.config.quantization_config = FactorizedConfig()


def _writing(part: str, kinds: tuple[type[nn.Module], ...]) -> WeightConverter:
    pattern = part.replace(".", r"\.")
    return WeightConverter(pattern, pattern, operations=[WriteMark(part, kinds)])


def _is_ours(conversions: list[Any] | None) -> bool:
    """Whether conversions come from here or from `write_names_of_modules`."""
    return conversions is not None and all(
        isinstance(op, WriteMark) for entry in conversions for op in getattr(entry, "operations", (None,))
    )


class SkipsMark(nn.Module):
    """A factorised layer, which loads a state dict with its mark as if the mark was not there."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = f"{prefix}weight"
        if key in unexpected_keys and state_dict[key].shape == MARK:
            unexpected_keys.remove(key)
