"""How many operations do forward and backward of one adapted Linear start, beside every other method that PEFT has?

    python benchmarks/launches.py

On an accelerator a small model's step is bound by the number of its launches. Counted are operations that make a
tensor and are not views, in a forward and a backward with a fixed gradient, to the input and to what is trained, less
those of the bare base layer. That is exact, and the same on any machine: it is counted on the meta device, and on the
CPU, with few tokens, for methods whose operations the meta device lacks and under autocast, which it has not.
`--device cuda` counts the kernels that run instead.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import harness
import models
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wara_peft import WaRAConfig

SHAPES = ((2048, 2048), (2048, 8192), (2048, 512))  # in, out
TOKENS, TOKENS_ON_CPU = 512, 8
# what a config needs beside the targets, where PEFT's defaults do not fit one layer
FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 32},
    "C3A": {"block_size": 64},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 32},
    "VBLORA": {"vector_length": 64},
}
# These adapt a model, its prompt, its norms or its embeddings, or choose among tasks.
NOT_FOR_A_LINEAR = {"ADAPTION_PROMPT", "LN_TUNING", "POLY", "SHADOW", "TRAINABLE_TOKENS", "XLORA"}


class Operations(TorchDispatchMode):
    """Counts the operations under it that make a tensor and are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What reshapes a fresh copy is called an unsafe view.
        view = func.is_view or func is torch.ops.aten._unsafe_view.default
        if not view and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.names[str(func)] += 1
        return result


def operations(step: Callable[[], None]) -> int:
    with Operations() as counted:
        step()
    return counted.names.total()


def kernels(step: Callable[[], None]) -> int:
    """Kernels, copies and fills that a step starts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def launches(config: PeftConfig | None, shape: tuple[int, int], device: str, autocast: bool) -> int:
    """Of one layer with that adapter, or of the base layer for None, once it is warm."""
    layer: nn.Module = nn.Linear(*shape).requires_grad_(False)
    if config is not None:
        config.target_modules = {"0"}
        layer = get_peft_model(nn.Sequential(layer), config).base_model.model
    layer.to(device)
    tokens = TOKENS_ON_CPU if device == "cpu" else TOKENS
    x = torch.ones(tokens, shape[0], device=device, requires_grad=True)
    gradient = torch.ones(tokens, shape[1], device=device, dtype=torch.bfloat16 if autocast else None)

    def step() -> None:
        with torch.autocast("cuda" if device == "cuda" else "cpu", torch.bfloat16, enabled=autocast):
            result = layer(x)
        result.backward(gradient.to(result.dtype))

    for _ in range(2):
        step()
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
    return kernels(step) if device == "cuda" else operations(step)


def added(make: Callable[[], PeftConfig], shape: tuple[int, int], device: str, autocast: bool) -> int:
    """What an adapter adds to its base layer."""
    if device == "meta" and autocast:
        device = "cpu"
    try:
        found = launches(make(), shape, device, autocast)
    except (NotImplementedError, RuntimeError):
        if device != "meta":
            raise
        device = "cpu"
        found = launches(make(), shape, device, autocast)
    return found - launches(None, shape, device, autocast)


def others() -> Iterator[tuple[str, Callable[[], PeftConfig]]]:
    """Every method of PEFT that injects into a Linear, with its defaults."""
    for kind, cls in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items()):
        injects = kind in PEFT_TYPE_TO_TUNER_MAPPING and "target_modules" in cls.__dataclass_fields__
        if injects and kind.value not in {"LORA", "WARA", *NOT_FOR_A_LINEAR}:
            yield kind.value, lambda cls=cls, name=kind.value: cls(**FIELDS.get(name, {}))


def ours() -> Iterator[tuple[str, Callable[[], PeftConfig]]]:
    yield "LoRA r=16", lambda: LoraConfig(r=16, lora_alpha=16)
    for name, fields in models.WARA.items():
        yield name, lambda fields=fields: WaRAConfig(**fields)


if __name__ == "__main__":
    options = harness.parser(__doc__, "launches", rounds=1).parse_args()
    device = "cuda" if options.device == "cuda" else "meta"
    shapes = ((256, 256),) if options.smoke else SHAPES
    warnings.simplefilter("ignore")  # of methods' own, about a model without a config
    results: dict[str, dict[str, dict[str, int]]] = {}
    for name, make in (*ours(), *others()):
        results[name] = {
            f"{shape[0]} -> {shape[1]}": {
                "float32": added(make, shape, device, autocast=False),
                "bfloat16 autocast": added(make, shape, device, autocast=True),
            }
            for shape in (shapes if name.startswith(("LoRA", "WaRA")) else shapes[:1])
        }
    for name, row in results.items():
        print(
            f"{name:16}",
            *(f"{shape}: {n['float32']:4} {n['bfloat16 autocast']:4}" for shape, n in row.items()),
            sep="  ",
            file=sys.stderr,  # beside the JSON
        )
    harness.save(options, {"counted": "kernels" if device == "cuda" else "operations", "launches": results})
