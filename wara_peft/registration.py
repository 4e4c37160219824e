"""Makes PEFT know the method WARA: a member of its `PeftType` enum, and the entries of its registries."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "WARA"


def peft_type() -> PeftType:
    """The member `PeftType.WARA`, added to the enum if it is not there.

    PEFT's registry accepts members only, and the enum is closed, so the member is made as the enum's own machinery
    makes one.

    Raises:
        ImportError: the installed PEFT has a WARA of its own.
    """
    if NAME not in PeftType.__members__:
        return _add_member()
    member = PeftType.__members__[NAME]
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if not getattr(member, "_added_by_wara_peft", False) or (
        registered is not None and not registered.__module__.startswith("wara_peft.")
    ):
        raise ImportError(
            "The installed PEFT has a method WARA of its own, which wara_peft does not replace. Use PEFT's, or "
            "install a PEFT without it beside this version of wara-peft."
        )
    return member


def register(config_class: type, model_class: type) -> None:
    """Register the classes under `PeftType.WARA`; doing so again, as a reload does, replaces the earlier ones."""
    member = peft_type()
    for registry in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        registry.pop(member, None)
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)


def _add_member() -> PeftType:
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    member._added_by_wara_peft = True  # type: ignore[attr-defined]
    # EnumType.__setattr__ refuses to rebind members, and type's does not.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)  # Python 3.13 on
    if hashable_values is not None:
        hashable_values.append(NAME)
    return member
