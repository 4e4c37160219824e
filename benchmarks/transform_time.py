"""Which way to transform a factor is the fastest on a CPU: polyphase steps, matrices, or convolutions?

    python benchmarks/transform_time.py

One synthesis and one adjoint of a factor with r = 4 for each subband, by every way of `wara_peft/equivalent.py` and by
the polyphase steps of `wara_peft/wavelet.py`, as ratios to the polyphase steps. `chosen` is the way that the library
takes at that length.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch

from wara_peft import equivalent, wavelet
from wara_peft.factors import SubbandFactor

RANK = 4


def transform(length: int, name: str, levels: int, dim: int) -> Callable[[], None]:
    ranks = {band.name: RANK for band in wavelet.subbands(levels) if band.level}
    factor = SubbandFactor(name, levels, length, ranks, dim)
    coefficients = [None if rows is None else torch.randn_like(rows) for rows in factor.coefficients()]
    signal = torch.randn_like(wavelet.synthesis(coefficients, factor.axis, dim))

    def run() -> None:
        wavelet.synthesis(coefficients, factor.axis, dim)
        wavelet.adjoint(signal, factor.axis, dim)

    return run


if __name__ == "__main__":
    options = harness.parser(__doc__, "transform_time", rounds=51).parse_args()
    in_one_step = wavelet._in_one_step
    longest, shortest = equivalent.LONGEST_MATRIX, equivalent.SHORTEST_COLUMN
    results = []
    for length in (64,) if options.smoke else (384, 768, 1536, 2048, 4096):
        for name, levels in (("haar", 1), ("haar", 3), ("db4", 1), ("db4", 3)):
            for dim in (1, 0):
                ways: dict[str, tuple[bool, int]] = {"polyphase": (False, 0)}
                if name == "haar" and dim == 1:
                    ways["product"] = (True, 0)
                elif name != "haar":
                    ways["convolution"] = (True, 0)
                    if length <= 768:
                        ways["matrix"] = (True, length)
                calls = {}
                for way, (fast, limit) in ways.items():
                    run = transform(length, name, levels, dim)

                    def call(run: Callable[[], None] = run, fast: bool = fast, limit: int = limit) -> None:
                        wavelet._in_one_step = in_one_step if fast else lambda *_: False
                        equivalent.LONGEST_MATRIX, equivalent.SHORTEST_COLUMN = limit, 0
                        run()

                    calls[way] = call
                seconds = harness.interleaved(calls, options.rounds, warmup=5)
                equivalent.LONGEST_MATRIX, equivalent.SHORTEST_COLUMN = longest, shortest
                chosen = "polyphase"
                axis = wavelet.Axis(name, length, ("",) * levels + ("a",))
                if equivalent.covers(axis, wavelet.filters(name), dim):
                    chosen = "product" if name == "haar" else "matrix" if length <= longest else "convolution"
                results.append(
                    {
                        "length": length,
                        "wavelet": name,
                        "levels": levels,
                        "dim": dim,
                        "chosen": chosen,
                        "to_polyphase": {
                            way: harness.ratio(times, seconds["polyphase"]) for way, times in seconds.items()
                        },
                    }
                )
    wavelet._in_one_step = in_one_step
    harness.save(options, {"transforms": results})
