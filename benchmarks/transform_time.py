"""How long is a transform in each of the ways that wara_peft/wavelet/ has?

    python benchmarks/transform_time.py

The synthesis of Â (`dim` 1) and B̂ (`dim` 0) with r = 4 for each subband, and its adjoint on a gradient as it lies in
training: by products of blocks with small matrices (`blocks.py`), which serve whatever the ranks are and in compiled
graphs; beside it in one step (`one_step.py`), for equal ranks; or, for one level of Haar, by elementwise operations
(`haar.py`). Filters have 2, 8, 16 and 32 taps.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch

from wara_peft import wavelet
from wara_peft.forms import SubbandFactor
from wara_peft.wavelet import haar, one_step

RANK = 4


def by_blocks(call: Callable[[], object]) -> Callable[[], None]:
    """The transform by blocks: the two other ways are switched off."""

    def run() -> None:
        devices, serves = one_step.DEVICES, haar.serves
        one_step.DEVICES, haar.serves = (), lambda *_: False
        try:
            call()
        finally:
            one_step.DEVICES, haar.serves = devices, serves

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
                    calls = {"as chosen": call, "blocks": by_blocks(call)}
                    seconds = harness.interleaved(calls, options.rounds, warmup=5, device=options.device)
                    row = {"length": length, "wavelet": name, "levels": levels, "dim": dim, "operation": operation}
                    results.append({**row, **harness.summary(seconds, "blocks")["as chosen"]})
    harness.save(options, {"transforms": results})
