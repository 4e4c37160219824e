"""What all benchmarks share: interleaved timing, ratios pair by pair, and a record of where it ran.

Machines are noisy, so a time by itself says little. All variants of one question run in one process, in rounds; every
round times each variant once, and begins with another one. A ratio is taken within each round, and the median over the
rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after `warmup` untimed rounds.

    Args:
        variants: what to time, by name.
        rounds: number of timed rounds.
        warmup: number of rounds before them.
        device: on "cuda" times come from events on the device, which a call's launches are recorded between.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            taken = _time_on_cuda(variants[name]) if device == "cuda" else _time(variants[name])
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def _time(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _time_on_cuda(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)), 4)


def spread(numerator: list[float], denominator: list[float]) -> tuple[float, float]:
    """Quartiles of the ratio within a round, which tell how far to trust its median."""
    quartiles = statistics.quantiles((a / b for a, b in zip(numerator, denominator, strict=True)), n=4)
    return round(quartiles[0], 4), round(quartiles[2], 4)


def summary(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """For each variant its median seconds, and median and quartiles of its ratio to the baseline."""
    return {
        name: {
            "median_seconds": float(f"{statistics.median(values):.4g}"),
            "ratio": ratio(values, seconds[baseline]),
            "quartiles": spread(values, seconds[baseline]),
        }
        for name, values in seconds.items()
    }


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where a result comes from: device, threads and versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers", "PyWavelets")},
    }


def parser(doc: str | None, result: str, rounds: int = 15) -> argparse.ArgumentParser:
    """Options that all scripts have: rounds, device, and the JSON file to write."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=rounds, help="timed rounds (default: %(default)s)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    options.add_argument("--output", type=Path, default=RESULTS / f"{result}.json", help="JSON file to write")
    options.add_argument(
        "--smoke", action="store_true", help="tiny sizes, to see that it runs; the numbers mean nothing"
    )
    return options


def save(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Write a result with its environment as JSON, and print it."""
    text = json.dumps({"environment": environment(options.device), "rounds": options.rounds, **result}, indent=2)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text + "\n")
    print(text)
