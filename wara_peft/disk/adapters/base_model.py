"""The model that an adapter belongs to, without its weights: which parameters it has, and what PEFT does to them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.other import EMBEDDING_LAYER_NAMES, match_target_against_key
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...base_layers.lora_places import loras_targets
from ...config import WaRAConfig
from ...config_fields.name_patterns import suffix_matches
from ...layers.base import WaRALayer
from ...layers.lookup import saved_keys
from ...messages import first_few
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.skeleton import Skeleton
from .adapter import SavedAdapter
from .contents import PEFT_INTERNAL, PEFT_PREFIX, parameter_of

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class with which PEFT's `AutoPeftModel...` loads the base of an adapter of each task type."""


def empty_model(checkpoint: Checkpoint, saved: SavedAdapter, parameters: dict[str, str]) -> PreTrainedModel:
    """The model that an adapter was trained on, built from the base's config on the meta device.

    Its class is the one that the adapter's config names or its task type stands for, or else the base's own.

    Args:
        checkpoint: the base model's.
        saved: the adapter.
        parameters: names that the model must have, and for what the adapter holds in full its key.

    Raises:
        FileNotFoundError: the base has no config.
        ValueError: its config cannot be used, or no class has parameters of these names.
    """
    skeleton = Skeleton(checkpoint, len(parameters))
    with skeleton.blamed():
        classes = _model_classes(skeleton.config, saved)
    if getattr(skeleton.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{str(checkpoint.base)!r} is quantized. Merge into the model it was made from, and quantize the result."
        )
    problems = []
    for model_class in classes:
        model = skeleton.make(model_class)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        missing = [repr(name) for name in parameters if name not in shapes]
        if not missing:
            labels = _labels(saved, parameters, shapes)
            if labels is None:
                return model
            skeleton.config.num_labels = labels
            return skeleton.make(model_class)
        problems.append(f"{model_class.__name__} has no {first_few(missing)}")
    reason = "; ".join(problems) or "its config names no class of transformers"
    raise ValueError(f"The adapter does not fit {str(checkpoint.base)!r}: {reason}.")


def _model_classes(config: PreTrainedConfig, saved: SavedAdapter) -> list[type[PreTrainedModel]]:
    mapping = saved.config.auto_mapping
    names = [mapping.get("base_model_class") if isinstance(mapping, dict) else None, *(config.architectures or [])]
    found = [getattr(transformers, str(name), None) for name in names]
    auto_class = AUTO_CLASSES.get(str(saved.config.task_type))
    if auto_class is not None:
        found.insert(0, getattr(transformers, auto_class)._model_mapping.get(type(config), None))
    classes = [entry for entry in found if isinstance(entry, type) and issubclass(entry, PreTrainedModel)]
    return [entry for entry in dict.fromkeys(classes) if isinstance(config, entry.config_class or PreTrainedConfig)]


def _labels(saved: SavedAdapter, parameters: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Number of labels for which the adapter has trained a head in full, if that is not the base config's."""
    if saved.config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    in_full = {name: saved.others[key].shape for name, key in parameters.items() if key}
    heads = {
        shape[0] for name, shape in in_full.items() if shape[1:] == shapes[name][1:] and shape[:1] != shapes[name][:1]
    }
    return heads.pop() if len(heads) == 1 else None


class AdaptedModel:
    """What PEFT makes of the model and an adapter's config: what trains, what is saved, and which weights go together.

    PEFT itself is asked, with a small adapter on the meta device. Which weights it ties depends on the model, and not
    on `ensure_weight_tying` alone.

    Attributes:
        saved: names of the parameters, in the model, that PEFT saves besides the adapter.
        owned: names of the parameters that the adapter changes through the modules that PEFT has wrapped. All others
            it changes by loading new values into them, which all parameters tied to them then have too.

    Raises:
        ValueError: PEFT cannot put the adapter on the model.
    """

    def __init__(self, model: PreTrainedModel, saved: SavedAdapter) -> None:
        config = saved.config
        names = [name for name, _ in model.named_modules()]
        ties = config.ensure_weight_tying and _may_tie(config)
        targets = config.target_modules if ties and not isinstance(config.target_modules, str) else None
        # By its names of embeddings, which may be those of tied layers alone, PEFT knows that it has something to tie.
        embeddings = [name for name in targets or () if is_name_of_embedding(name)]
        modules, parameters = loras_targets(saved.modules)
        small = WaRAConfig(
            r=1,
            target_modules=[*modules, *embeddings],
            target_parameters=parameters or None,
            exclude_modules=suffix_matches(saved.modules, names),
            bias=config.bias,
            modules_to_save=copy.copy(config.modules_to_save),
            trainable_token_indices=copy.deepcopy(config.trainable_token_indices),
            ensure_weight_tying=ties,
        )
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrapped = PeftModel(copy.deepcopy(model), small, low_cpu_mem_usage=True)
                state_dict = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        except Exception as error:
            name = type(model).__name__
            raise ValueError(f"The adapter in {str(saved.path)!r} does not fit {name}: {error}") from error
        keys = [key.removeprefix(PEFT_PREFIX) for key in state_dict.keys() - saved_keys(wrapped, "default")]
        self.saved = {parameter_of(key) for key in keys if not PEFT_INTERNAL.search(key)}
        self.owned = set(_owned(wrapped))


def _may_tie(config: WaRAConfig) -> bool:
    """Whether PEFT looks for tied weights: it does so where the config names an embedding by one of two names."""
    targets = config.target_modules
    if isinstance(targets, str):
        named = any(match_target_against_key(targets, name) for name in EMBEDDING_LAYER_NAMES)
    else:
        named = any(map(is_name_of_embedding, targets or ()))
    return named or any(map(is_name_of_embedding, config.modules_to_save or ()))


def is_name_of_embedding(module_name: str) -> bool:
    """Whether PEFT takes a module of this name for an embedding, and so looks for what is tied to it."""
    return module_name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES


def _owned(wrapped: nn.Module) -> Iterator[str]:
    for name, module in wrapped.named_modules():
        inner = name.removeprefix(PEFT_PREFIX)
        if isinstance(module, WaRALayer):
            yield module.shape.parameter_of(inner)
        elif isinstance(module, TrainableTokensWrapper):
            yield f"{inner}.weight"
        elif isinstance(module, ModulesToSaveWrapper):
            yield from (f"{inner}.{key}" for key in module.original_module.state_dict())
