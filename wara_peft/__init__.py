"""WaRA (Wavelet Low-Rank Adaptation, arXiv 2506.24092) for Hugging Face PEFT; importing it registers the method."""

from . import registration

registration.peft_type()  # `WaRAConfig` names `PeftType.WARA`, so the member comes first.

from .allocation import RankSchedule, allocate_ranks  # noqa: E402
from .checkpoint_callback import SaveAsLora  # noqa: E402
from .config import WaRAConfig  # noqa: E402
from .export import lora_error, save_as_lora, to_lora  # noqa: E402
from .forms import frozen_factors  # noqa: E402
from .initialization import initialize_from_data  # noqa: E402
from .load_lora import load_lora  # noqa: E402
from .lora_view import LoraView, lora_view  # noqa: E402
from .model import WaRAModel  # noqa: E402
from .nested import RankShrinking, rank_penalty, shrink_ranks  # noqa: E402
from .optimizer_groups import optimizer_groups  # noqa: E402
from .rescaling import rescale_adapter_scale  # noqa: E402

registration.register(WaRAConfig, WaRAModel)

__all__ = [
    "LoraView",
    "RankSchedule",
    "RankShrinking",
    "SaveAsLora",
    "WaRAConfig",
    "WaRAModel",
    "allocate_ranks",
    "frozen_factors",
    "initialize_from_data",
    "load_lora",
    "lora_error",
    "lora_view",
    "optimizer_groups",
    "rank_penalty",
    "rescale_adapter_scale",
    "save_as_lora",
    "shrink_ranks",
    "to_lora",
]
__version__ = "0.1.0"
