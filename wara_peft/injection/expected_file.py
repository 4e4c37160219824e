"""Checks an adapter that is being loaded: its config has arrived, and its tensors may follow.

PEFT and transformers first add an adapter with the saved config, and load its tensors later. If the tensors come, the
model must have the modules that they were saved for. If they never come, the config only serves for a new adapter, and
any model will do.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..base_layers.kinds import KINDS
from ..config import WaRAConfig
from ..layers.base import TENSOR_PARTS
from ..layers.lookup import adapted_layers, fields_in_model, without_wrappers
from ..messages import first_few
from ..wavelet import axis_sizes
from .saved_besides_factors import trained_biases


@dataclass(frozen=True)
class AwaitedAdapter:
    """An adapter in the model that was added with a saved config, and whose saved tensors may still be loaded.

    Attributes:
        config: the config as it was loaded, with the shapes and hashes of the modules for which the tensors were
            saved. The model does not overwrite these two fields.
        trained: names of the model's parameters that trained before the adapter was added.
    """

    config: WaRAConfig
    trained: list[str]

    def check_if_given(self, tuner: Any, adapter_name: str, state_dict: Mapping[str, Tensor], prefix: str) -> bool:
        """Check a state dict that is being loaded into the tuner, if it may contain the tensors of the saved adapter.

        Args:
            tuner: the tuner that has the adapter.
            adapter_name: the adapter's name.
            state_dict: the state dict that is being loaded.
            prefix: the beginning of the tuner's keys in the state dict.

        Returns:
            Whether the state dict may contain the tensors.

        Raises:
            ValueError: the tensors were saved for a model with other modules, or some are missing.
        """
        found = fields_in_model(tuner, adapter_name)
        given = _factors_in(state_dict, tuner, adapter_name, prefix)
        own = _factors_in(tuner.state_dict(prefix=prefix), tuner, adapter_name, prefix) if given else {}
        if not given or not self.may_be(given, own, found):
            return False
        self.check(found)
        self.check_tensors(given, own)
        names = {without_wrappers(key.removeprefix(f"{prefix}model.")) for key in state_dict}
        biases = trained_biases(tuner.model, self.config, adapter_name, tuner.model.state_dict())
        self.check_biases(key for key in biases if without_wrappers(key) not in names)
        return True

    def check(self, found: Mapping[str, Any]) -> None:
        """Compare the modules for which the adapter was saved with the modules that have it now.

        Args:
            found: fields of the config as this model has found them (`fields_in_model`).

        Raises:
            ValueError: modules have other shapes or, if the file lacks the basis (`save_basis=False`), other weights.
        """
        _check_shapes(self.config.module_shapes or {}, found["module_shapes"])
        _check_base_weights(self.config.base_weight_hashes or {}, found["base_weight_hashes"] or {})

    def check_tensors(self, given: Collection[str], own: Iterable[str]) -> None:
        """Refuse to load a file that lacks factors of modules for which the adapter was saved.

        Args:
            given: keys of the adapter's factors that are being loaded.
            own: keys of the adapter's factors in the model.

        Raises:
            ValueError: a key is missing.
        """
        modules = tuple(f"{name}." for name in self.config.module_shapes or ())
        missing = [repr(key) for key in own if key.startswith(modules) and key not in given]
        if missing:
            raise ValueError(
                f"The file of the saved adapter lacks {first_few(missing)}, which its config asks for. Use a complete "
                "copy of the adapter, whose two files belong together."
            )

    def check_biases(self, missing: Iterable[str]) -> None:
        """Refuse to load a file, or warn, if it lacks biases that train with the adapter.

        Args:
            missing: keys of biases that train with the adapter and are not being loaded.

        Raises:
            ValueError: a layer for which the adapter was saved lacks its bias.

        Warns:
            UserWarning: another bias is missing. Its module did not exist when the adapter was saved, or it is one
                that wara-peft 0.1.0 did not save: a bias of an attention or of a module with bare parameters.
        """
        beside_weights = {f"{name}.base_layer.bias" for name in self.config.module_shapes or {}}
        missing = sorted(missing)
        lacking = [repr(key) for key in missing if key in beside_weights]
        promise = f"bias={self.config.bias!r} in the config of the saved adapter promises"
        if lacking:
            raise ValueError(
                f"{promise} {first_few(lacking)}, which its file lacks. Use a complete copy of the adapter."
            )
        if missing:
            warnings.warn(
                f"{promise} {first_few(list(map(repr, missing)))}, which its file lacks: what it learnt there is "
                "lost, and the base model's values stay."
            )

    def warn_if_another(self, found: Mapping[str, Any]) -> None:
        """Warn if the adapter's tensors cannot be loaded into this model, though the config says that they will be.

        A config with `inference_mode` is meant for loading, since a new adapter with it would not train. `check` runs
        in `load_state_dict`, which transformers does not call when it loads tensors.
        """
        if self.config.inference_mode:
            try:
                self.check(found)
            except ValueError as error:
                warnings.warn(f"{error} A new adapter is made with its config, which does not train (inference_mode).")

    def may_be(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], found: Mapping[str, Any]) -> bool:
        """Say whether tensors may come from the saved adapter, and not from a checkpoint of the adapter in the model.

        Args:
            tensors: the factors that are being loaded, by key.
            own: the factors that the model has, by key.
            found: fields of the config as this model has found them.
        """
        # Tensors of other shapes cannot come from this model's adapter. If shapes are equal, both are possible; they
        # come from the saved adapter only if its modules have axes that give factors of equal shapes.
        if any(key in own and own[key].shape != tensor.shape for key, tensor in tensors.items()):
            return True
        saved, here = self.config.module_shapes or {}, found["module_shapes"]
        lengths = [
            pair for name in saved.keys() & here.keys() for pair in zip(saved[name][1:3], here[name][1:3], strict=True)
        ]
        return all(axis_sizes(before, 1)[1] == axis_sizes(now, 1)[1] for before, now in lengths)


def _factors_in(state_dict: Mapping[str, Tensor], tuner: Any, adapter_name: str, prefix: str) -> dict[str, Tensor]:
    """Collect the tensors of an adapter's factors from a state dict, by key without the prefix.

    PEFT inserts the adapter's name only into those of a file's keys that it finds in the model. All others come
    without it.
    """
    parts = {f"{prefix}model.{name}.{part}" for name in adapted_layers(tuner.model) for part in TENSOR_PARTS}
    found = {}
    for key, tensor in state_dict.items():
        container, _, last = key.rpartition(".")
        of_adapter = container.removesuffix(f".{adapter_name}") in parts and last not in tuner.peft_config
        if of_adapter or key.removesuffix(f".{adapter_name}") in parts:
            found[key.removeprefix(f"{prefix}model.")] = tensor
    return found


def _check_shapes(saved: Mapping[str, list[Any]], found: Mapping[str, list[Any]]) -> None:
    """Compare the modules for which an adapter was saved with the modules into which it is being loaded.

    Args:
        saved, found: `WaRAConfig.module_shapes` of the saved adapter and of this model.

    Raises:
        ValueError: shapes differ, or the adapter was trained beside factorised layers and these are not factorised in
            the same way here.
    """
    different = [
        f"{name!r} (saved {tuple(saved[name][1:])}, here {tuple(shape[1:])})"
        for name, shape in found.items()
        if saved.get(name, shape)[1:] != shape[1:]
    ]
    if different:
        raise ValueError(
            f"The saved adapter was made for modules of other (out, in) shapes: {first_few(different)}. Load it on "
            "the base model it was trained on (with its embeddings resized as they were then)."
        )
    healed = [
        repr(name)
        for name, shape in found.items()
        if name in saved and saved[name][0] != shape[0]
        if (kind := KINDS.get(saved[name][0])) and kind.is_factorized
    ]
    if healed:
        raise ValueError(
            f"The saved adapter was trained beside factorised layers, and here they are not factorised alike: "
            f"{first_few(healed)}. Load it on the compressed model that it was trained on."
        )
    missing = [repr(name) for name in saved if name not in found]
    if missing:
        warnings.warn(
            f"The saved adapter also adapts {first_few(missing)}, which this model does not have or the config does "
            "not target; that part of it is ignored."
        )


def _check_base_weights(saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the base weights from which a saved adapter's basis was computed with those of this model.

    Args:
        saved, found: `WaRAConfig.base_weight_hashes` of the saved adapter and of this model.

    Raises:
        ValueError: hashes differ.
    """
    different = [repr(name) for name, value in found.items() if saved.get(name, value) != value]
    if different:
        raise ValueError(
            f"The saved adapter was saved with save_basis=False, and its basis comes from other base weights than "
            f"those of module {first_few(different)}. Load it on the base model it was trained on, in the same dtype "
            "and with the same quantization, or train it with save_basis=True."
        )
