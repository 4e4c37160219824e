"""Which way to transform a factor is the fastest on a CPU: polyphase steps, products, matrices, or convolutions?

    python benchmarks/transform_time.py

The synthesis of Â (`dim` 1) and B̂ (`dim` 0) with r = 4 for each subband, and its adjoint on a gradient as it lies in
training (B̂'s is a transpose), by each way of `wara_peft/equivalent.py` and by the polyphase steps of
`wara_peft/wavelet.py`, as ratios to the latter. `chosen` is the way that the library takes there.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from torch import Tensor

from wara_peft import equivalent, wavelet
from wara_peft.forms import SubbandFactor

RANK = 4
IN_ONE_STEP, LONGEST_MATRIX = wavelet._in_one_step, equivalent.LONGEST_MATRIX


def by_way(call: Callable[[], object], way: str) -> Callable[[], None]:
    """The same by one of the ways, whatever the library would take."""

    def run() -> None:
        wavelet._in_one_step = lambda *_: way != "polyphase"
        equivalent.LONGEST_MATRIX = 10**9 if way == "matrix" else 0
        try:
            call()
        finally:
            wavelet._in_one_step, equivalent.LONGEST_MATRIX = IN_ONE_STEP, LONGEST_MATRIX

    return run


def operations(length: int, name: str, levels: int, dim: int) -> dict[str, tuple[Callable[[], object], bool]]:
    """Synthesis and adjoint of one factor, each with whether the library transforms it in one step."""
    ranks = {band.name: RANK for band in wavelet.subbands(levels) if band.level}
    factor = SubbandFactor(name, levels, length, ranks, dim)
    axis, coefficients = factor.axis, [None if rows is None else rows.detach() for rows in factor.coefficients()]
    gradient = torch.randn(factor.rank, length)
    gradient = gradient if dim == 1 else gradient.T
    first: Tensor = next(rows for rows in coefficients if rows is not None)
    return {
        "synthesis": (lambda: wavelet.synthesis(coefficients, axis, dim), IN_ONE_STEP(first, axis, dim)),
        "adjoint": (lambda: wavelet.adjoint(gradient, axis, dim), IN_ONE_STEP(gradient, axis, dim)),
    }


if __name__ == "__main__":
    options = harness.parser(__doc__, "transform_time", rounds=51).parse_args()
    results = []
    for length in (64,) if options.smoke else (384, 768, 1536, 2048, 4096):
        for name, levels in (("haar", 1), ("haar", 3), ("db4", 1), ("db4", 3)):
            ways = ["product"] if name == "haar" else ["convolution"]
            if name != "haar" and length <= 768:
                ways.append("matrix")
            for dim in (1, 0):
                for operation, (call, in_one_step) in operations(length, name, levels, dim).items():
                    calls = {way: by_way(call, way) for way in ("polyphase", *ways)}
                    seconds = harness.interleaved(calls, options.rounds, warmup=5)
                    fast = "matrix" if name != "haar" and length <= LONGEST_MATRIX else ways[0]
                    results.append(
                        {
                            "length": length,
                            "wavelet": name,
                            "levels": levels,
                            "dim": dim,
                            "operation": operation,
                            "chosen": fast if in_one_step else "polyphase",
                            "to_polyphase": {way: harness.ratio(seconds[way], seconds["polyphase"]) for way in ways},
                        }
                    )
    harness.save(options, {"transforms": results})
