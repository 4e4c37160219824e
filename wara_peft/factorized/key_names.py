"""Names of tensors in files of transformers, which renames some of them when it writes and when it reads a model."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


def names_on_loading(model: nn.Module, keys: Iterable[str], state: Container[str] | None = None) -> dict[str, str]:
    """Give the name in the model under which transformers loads each key of a checkpoint.

    Transformers converts some tensors on loading: it may fuse or split them. Keys of such tensors are left out.

    Args:
        model: the model; the keys of other models than those of transformers are their names.
        keys: the keys of all tensors of the checkpoint.
        state: the model's state dict. If it is given, keys get or lose the prefix of the model's base model, as they
            do on loading; otherwise keys are only renamed.
    """
    if not isinstance(model, PreTrainedModel):
        return {key: key for key in keys}
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    prefix = None if state is None else model.base_model_prefix
    names: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):  # some renamings wait for a key that comes before in this order
        name, converted = rename_source_key(key, renamings, converters, prefix, state)  # type: ignore[arg-type]
        if state is not None and name not in state and key in state:
            name, converted = key, None  # the checkpoint has the names of the model's modules
        if converted is None:
            names[key] = name
    return names


def missing_names(model: nn.Module, state: Mapping[str, Tensor], there: Container[str]) -> list[str]:
    """Give the names of a model's state dict that a checkpoint lacks, and should have.

    Transformers writes a tensor of several names once, and no tensor that it makes from the config.
    """
    written = {tensor.data_ptr() for name, tensor in state.items() if name in there}
    ignored = re.compile("|".join(getattr(model, "_keys_to_ignore_on_save", None) or ["(?!)"]))
    return [
        name
        for name, tensor in state.items()
        if name not in there and tensor.data_ptr() not in written and not ignored.search(name)
    ]


def write_names_of_modules(model: nn.Module) -> None:
    """Let transformers write the tensors of a model, and of its submodels, under their names in the model.

    `save_pretrained` turns names into those of older releases, and fuses some tensors. That is made for dense weights:
    it would put factors of q, k and v together that belong apart. `Trainer` does not undo it when it resumes.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # An empty list says that loading has converted nothing, so saving has nothing to undo.
            vars(module)["_weight_conversions"] = []
