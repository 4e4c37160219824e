"""WaRA (Wavelet Low-Rank Adaptation, arXiv 2506.24092) for Hugging Face PEFT; importing it registers the method."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import registration

if TYPE_CHECKING:
    from .allocation.schedule import RankSchedule
    from .lora.checkpoint_callback import SaveAsLora

# Every `WaRAConfig` sets `PeftType.WARA`, so the enum gets this member before anything else is imported.
registration.peft_type()

from .allocation import allocate_ranks  # noqa: E402
from .config import WaRAConfig  # noqa: E402
from .disk.checkpoints import quantizer as _quantizer  # noqa: E402, F401  # registers itself with transformers
from .forms import frozen_factors  # noqa: E402
from .lora.automatic import obey_environment  # noqa: E402
from .lora.export import lora_error, save_as_lora, to_lora  # noqa: E402
from .lora.load import load_lora  # noqa: E402
from .lora.reparametrize import plain_lora, reparametrize_lora  # noqa: E402
from .model import WaRAModel  # noqa: E402
from .training.initialization import initialize_from_data  # noqa: E402
from .training.optimizer_groups import optimizer_groups  # noqa: E402
from .training.scale import rescale_adapter_scale  # noqa: E402

registration.register(WaRAConfig, WaRAModel)
obey_environment()

__all__ = [
    "RankSchedule",
    "SaveAsLora",
    "WaRAConfig",
    "WaRAModel",
    "allocate_ranks",
    "frozen_factors",
    "initialize_from_data",
    "load_lora",
    "lora_error",
    "optimizer_groups",
    "plain_lora",
    "reparametrize_lora",
    "rescale_adapter_scale",
    "save_as_lora",
    "to_lora",
]
__version__ = "0.1.0"

_CALLBACKS = {
    "RankSchedule": "allocation.schedule",
    "SaveAsLora": "lora.checkpoint_callback",
}


def __getattr__(name: str) -> Any:
    """Import a callback when somebody asks for it, since each callback needs transformers' Trainer.

    A part of Trainer can import PEFT while it is itself being imported, and `wara-peft run` imports this package right
    after PEFT. So importing this package must need nothing of Trainer.
    """
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_CALLBACKS[name]}", __name__), name)


def __dir__() -> list[str]:
    # Python would list only the callbacks that have been imported already.
    return sorted({*globals(), *__all__})
