"""Makes the method WARA known to PEFT: adds a member to its `PeftType` enum, and entries to its registries.

It also wraps `PeftModel.load_adapter`. PEFT loads a saved adapter over one that is in the model without a look at the
saved config. So the wrapped function first calls the tuner's method `check_saved_adapter`, if the tuner has one.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "WARA"


def peft_type() -> PeftType:
    """Return the member `PeftType.WARA`, which is added to the enum if it is not there.

    PEFT's registry accepts only members of the enum, and Python lets nobody extend an enum that has members. So this
    does by hand what Python's `EnumType` does when it makes a member.

    Raises:
        ImportError: the installed PEFT has a WARA of its own.
    """
    if NAME not in PeftType.__members__:
        return _add_member()
    member = PeftType.__members__[NAME]
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    # This package may be imported twice, as a reload does; the member is then its own.
    if not getattr(member, "_added_by_wara_peft", False) or (
        registered is not None and not registered.__module__.startswith("wara_peft.")
    ):
        raise ImportError(
            "The installed PEFT has a method WARA of its own, which wara_peft does not replace. Use PEFT's, or "
            "install a PEFT without it beside this version of wara-peft."
        )
    return member


def register(config_class: type, model_class: type) -> None:
    """Register the classes under `PeftType.WARA`; after a reload the new classes replace the earlier ones."""
    member = peft_type()
    # PEFT refuses a method that its registries have already.
    for registry in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        registry.pop(member, None)
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)
    _ask_the_tuner_before_loading()


def _ask_the_tuner_before_loading() -> None:
    load_adapter = PeftModel.load_adapter
    # After a reload the function is wrapped already.
    if getattr(load_adapter, "_asks_the_tuner", False):
        return

    @functools.wraps(load_adapter)
    def asking(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        check = getattr(type(self.base_model), "check_saved_adapter", None)
        if check is not None and adapter_name in self.peft_config:
            check(self.base_model, adapter_name, model_id, **kwargs)
        return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    asking._asks_the_tuner = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = asking  # type: ignore[method-assign]


def _add_member() -> PeftType:
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    member._added_by_wara_peft = True  # type: ignore[attr-defined]
    # `EnumType.__setattr__` guards members; `type.__setattr__` sets any attribute.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)  # Python 3.13 on
    if hashable_values is not None:
        hashable_values.append(NAME)
    return member
