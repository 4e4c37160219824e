"""How much faster is a transform in one step than by elementwise operations?

    python benchmarks/transform_time.py

The synthesis of Â (`dim` 1) and B̂ (`dim` 0) with r = 4 for each subband, and its adjoint on a gradient as it lies in
training: in one step (`wara_peft/wavelet/one_step.py`), and by elementwise operations (`elementwise.py` beside it),
which torch.compile fuses and which serve where the kernel is missing. Filters have 2, 8, 16 and 32 taps.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch

from wara_peft import wavelet
from wara_peft.forms import SubbandFactor
from wara_peft.wavelet import one_step

RANK = 4
DEVICES = one_step.DEVICES


def elementwise(call: Callable[[], object]) -> Callable[[], None]:
    """The same without the kernel."""

    def run() -> None:
        one_step.DEVICES = ()
        try:
            call()
        finally:
            one_step.DEVICES = DEVICES

    return run


def operations(length: int, name: str, levels: int, dim: int, device: str) -> dict[str, Callable[[], object]]:
    """Synthesis and adjoint of one factor."""
    ranks = {band.name: RANK for band in wavelet.subbands(levels) if band.level}
    factor = SubbandFactor(name, levels, length, ranks, dim).to(device)
    axis, coefficients = factor.axis, [None if rows is None else rows.detach() for rows in factor.coefficients()]
    gradient = torch.randn(length, factor.rank, device=device)
    gradient = gradient if dim == 0 else gradient.T
    return {
        "synthesis": lambda: wavelet.synthesis(coefficients, axis, dim),
        "adjoint": lambda: wavelet.adjoint(gradient, axis, dim),
    }


if __name__ == "__main__":
    options = harness.parser(__doc__, "transform_time", rounds=51).parse_args()
    results = []
    for length in (64,) if options.smoke else (384, 768, 2048, 4096):
        for name, levels in (("haar", 1), ("haar", 3), ("db4", 1), ("db4", 3), ("db8", 1), ("db16", 1)):
            for dim in (1, 0):
                for operation, call in operations(length, name, levels, dim, options.device).items():
                    calls = {"one step": call, "elementwise": elementwise(call)}
                    seconds = harness.interleaved(calls, options.rounds, warmup=5, device=options.device)
                    row = {"length": length, "wavelet": name, "levels": levels, "dim": dim, "operation": operation}
                    results.append({**row, **harness.summary(seconds, "elementwise")["one step"]})
    harness.save(options, {"transforms": results})
