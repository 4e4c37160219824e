"""Builds an adapter's base model without weights, to learn its parameters and what PEFT does to them."""

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
from ...factorized.marks import quantization_of
from ...layers.base import WaRALayer
from ...layers.lookup import saved_keys
from ...messages import first_few
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.dequantized import DequantizedCheckpoint
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
"""For each task type, the auto class with which PEFT's `AutoPeftModel...` loads the base model."""


def empty_model(checkpoint: Checkpoint, saved: SavedAdapter, parameters: dict[str, str]) -> PreTrainedModel:
    """Build the model that an adapter was trained on from the base's config, on the meta device.

    The task type in the adapter's config is asked first for the model's class, then the config's `auto_mapping`, then
    the base's `architectures`. The first of these classes that has all `parameters` is used.

    Args:
        checkpoint: the base model's checkpoint.
        saved: the adapter.
        parameters: names of parameters that the model must have. The value is the adapter's key of a parameter that
            the adapter holds in full, or "" for one that it changes by factors or rows.

    Raises:
        FileNotFoundError: the base has no config.
        ValueError: the base's config cannot be used, or no class has parameters of these names.
    """
    skeleton = Skeleton(checkpoint, len(parameters))
    with skeleton.blamed():
        classes = _model_classes(skeleton.config, saved)
    if quantization_of(skeleton.config) is not None and not isinstance(checkpoint, DequantizedCheckpoint):
        raise ValueError(
            f"{str(checkpoint.base)!r} is quantized. If bitsandbytes quantized it, merge into its dequantized weights "
            "(dequantize=True, on the command line --dequantize); otherwise merge into the model it was made from, "
            "and quantize the result."
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
            # The base's config may have another number of labels than the adapter's head: build the model with it.
            skeleton.config.num_labels = labels
            return skeleton.make(model_class)
        problems.append(f"{model_class.__name__} has no {first_few(missing)}")
    reason = "; ".join(problems) or "its config names no class of transformers"
    raise ValueError(f"The adapter does not fit {str(checkpoint.base)!r}: {reason}.")


def _model_classes(config: PreTrainedConfig, saved: SavedAdapter) -> list[type[PreTrainedModel]]:
    """The classes of transformers that may be the model's, the most likely first, each one once.

    Names come from files that are not trusted, so a name counts only if transformers has a model class of that name.
    """
    mapping = saved.config.auto_mapping
    names = [mapping.get("base_model_class") if isinstance(mapping, dict) else None, *(config.architectures or [])]
    found = [getattr(transformers, str(name), None) for name in names]
    auto_class = AUTO_CLASSES.get(str(saved.config.task_type))
    if auto_class is not None:
        found.insert(0, getattr(transformers, auto_class)._model_mapping.get(type(config), None))
    classes = [entry for entry in found if isinstance(entry, type) and issubclass(entry, PreTrainedModel)]
    return [entry for entry in dict.fromkeys(classes) if isinstance(config, entry.config_class or PreTrainedConfig)]


def _labels(saved: SavedAdapter, parameters: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> int | None:
    """The number of labels of the adapter's head, if the adapter holds a head in full with more or fewer labels.

    None means that the base config's number is right, or that the shapes leave more than one answer.
    """
    if saved.config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    in_full = {name: saved.others[key].shape for name, key in parameters.items() if key}
    heads = {
        shape[0] for name, shape in in_full.items() if shape[1:] == shapes[name][1:] and shape[:1] != shapes[name][:1]
    }
    return heads.pop() if len(heads) == 1 else None


class AdaptedModel:
    """What PEFT saves and wraps if it puts an adapter on a model.

    This class does not repeat PEFT's rules. It lets PEFT put a small adapter with the same settings on a copy of the
    model on the meta device, and looks at the result: which weights PEFT ties depends on the model too, not only on
    `ensure_weight_tying`.

    Attributes:
        saved: the model's names of the parameters that PEFT saves besides the adapter's factors.
        owned: names of the parameters that the adapter changes through modules that PEFT has wrapped. PEFT loads new
            values into all other parameters, and parameters that are tied to one of these get its new values too.

    Raises:
        ValueError: PEFT cannot put the adapter on the model.
    """

    def __init__(self, model: PreTrainedModel, saved: SavedAdapter) -> None:
        config = saved.config
        names = [name for name, _ in model.named_modules()]
        ties = config.ensure_weight_tying and _may_tie(config)
        targets = config.target_modules if ties and not isinstance(config.target_modules, str) else None
        # PEFT looks for tied weights only if a target has a name that it knows as an embedding's. `modules` below may
        # lack that name, because `module_shapes` does not list layers that are tied to another one. So it is added.
        embeddings = [name for name in targets or () if is_name_of_embedding(name)]
        modules, parameters = loras_targets(saved.modules)
        # Two fields are copied, as PEFT may change them in place and the saved config must stay as it was read.
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
                # With its default, "auto", PEFT would add the base weights of embeddings that are targets.
                state_dict = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        except Exception as error:
            name = type(model).__name__
            raise ValueError(f"The adapter in {str(saved.path)!r} does not fit {name}: {error}") from error
        keys = [key.removeprefix(PEFT_PREFIX) for key in state_dict.keys() - saved_keys(wrapped, "default")]
        self.saved = {parameter_of(key) for key in keys if not PEFT_INTERNAL.search(key)}
        self.owned = set(_owned(wrapped))


def _may_tie(config: WaRAConfig) -> bool:
    """Whether PEFT looks for tied weights: it does so if the config names a module in `EMBEDDING_LAYER_NAMES`."""
    targets = config.target_modules
    if isinstance(targets, str):
        named = any(match_target_against_key(targets, name) for name in EMBEDDING_LAYER_NAMES)
    else:
        named = any(map(is_name_of_embedding, targets or ()))
    return named or any(map(is_name_of_embedding, config.modules_to_save or ()))


def is_name_of_embedding(module_name: str) -> bool:
    """Whether PEFT takes a module of this name for an embedding, and so looks for layers that are tied to it."""
    return module_name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES


def _owned(wrapped: nn.Module) -> Iterator[str]:
    """The model's names of parameters and buffers in the modules that PEFT has wrapped."""
    for name, module in wrapped.named_modules():
        inner = name.removeprefix(PEFT_PREFIX)
        if isinstance(module, WaRALayer):
            yield module.shape.parameter_of(inner)
        elif isinstance(module, TrainableTokensWrapper):
            yield f"{inner}.weight"
        elif isinstance(module, ModulesToSaveWrapper):
            yield from (f"{inner}.{key}" for key in module.original_module.state_dict())
