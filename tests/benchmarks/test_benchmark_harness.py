"""What all benchmarks share, on a clock that ticks as told: whose turn it is, and ratios within a round."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def harness(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("harness")


def test_rounds_time_each_variant_once_and_begin_with_another_one(harness, monkeypatch):
    now = 0.0
    calls = []

    def variant(name: str, seconds: list[float]) -> Callable[[], None]:
        durations = iter(seconds)

        def call() -> None:
            nonlocal now
            calls.append(name)
            now += next(durations)

        return call

    monkeypatch.setattr(harness, "perf_counter", lambda: now)
    # a warm-up round, then three
    variants = {"a": variant("a", [90, 1, 2, 4]), "b": variant("b", [80, 8, 16, 32]), "c": variant("c", [70] * 4)}
    seconds = harness.interleaved(variants, rounds=3, warmup=1)
    assert seconds == {"a": [1, 2, 4], "b": [8, 16, 32], "c": [70, 70, 70]}
    assert ["".join(calls[start : start + 3]) for start in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]


def test_ratios_are_taken_within_a_round(harness):
    base, other = [1.0, 10.0, 100.0, 2.0], [3.0, 20.0, 500.0, 8.0]
    ratios = [3.0, 2.0, 5.0, 4.0]
    assert harness.ratio(other, base) == 3.5
    assert statistics.median(other) / statistics.median(base) != 3.5
    low, _, high = statistics.quantiles(ratios, n=4)
    assert harness.spread(other, base) == (low, high)
    assert harness.summary({"base": base, "other": other}, "base") == {
        "base": {"median_seconds": 6.0, "ratio": 1.0, "quartiles": (1.0, 1.0)},
        "other": {"median_seconds": 14.0, "ratio": 3.5, "quartiles": (low, high)},
    }
