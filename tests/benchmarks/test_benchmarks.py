"""The benchmarks run, at tiny sizes, and what they say of counts, ranks and bytes is right, whatever the times."""

from __future__ import annotations

import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.forked_python import FORKS, run_python

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
# the fewest rounds whose quartiles lie within what was measured
SMOKE = ["--smoke", "--rounds", "3"]

# (out, in) of the layers that are adapted in the tiny models: q, k, v, o and the MLP
ENCODER = [(32, 32)] * 4 + [(64, 32), (32, 64)]
DECODER = [(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)]


def lora_rank(r: int) -> Callable[[int, int], int]:
    return lambda m, n: r * (m + n)


def wara_levels(levels: int, r: int = 4) -> Callable[[int, int], int]:
    return lambda m, n: r * (m + n) * (3 * 2**levels - 2) // 2**levels


def lokr(m: int, n: int) -> int:
    """Two Kronecker factors in full: 32 = 4 · 8, 64 = 8 · 8, and r = 8 is no low rank for their second ones."""
    first = {32: 4, 64: 8}
    return first[m] * first[n] + (m // first[m]) * (n // first[n])


# trained parameters of one layer (m, n); with `--smoke` VeRA and RandLoRA have r = 4, WaveFT and FourierFT 8 numbers
PARAMETERS: dict[str, Callable[[int, int], int]] = {
    "LoRA r=8": lora_rank(8),
    "LoRA r=16": lora_rank(16),
    "LoRA r=40": lora_rank(40),
    "WaRA haar L1": wara_levels(1),
    "WaRA db4 L1": wara_levels(1),
    "WaRA haar L3": wara_levels(3),
    "WaRA db4 L3": wara_levels(3),
    "MiSS r=16": lambda m, n: 16 * m,
    "DoRA r=8": lambda m, n: 8 * (m + n) + m,
    "LoKr r=8": lokr,
    "VeRA": lambda m, n: m + 4,
    "RandLoRA": lambda m, n: min(m, n) // 4 * (4 + min(m, n)),
    "WaveFT": lambda m, n: 8,
    "FourierFT": lambda m, n: 8,
    "WaRA haar L1 by ptwt": wara_levels(1),
}


def check_ratios(rows: dict[str, dict[str, Any]], baseline: str, variants: list[str]) -> None:
    """These variants and no other, and the baseline's ratio to itself is 1 in every round."""
    assert list(rows) == variants
    assert rows[baseline]["ratio"] == 1
    assert rows[baseline]["quartiles"] == [1, 1]
    for name, row in rows.items():
        low, high = row["quartiles"]
        assert low <= row["ratio"] <= high, name


def check_step_time(result: dict[str, Any], _: dict[str, Any]) -> None:
    assert (result["dtype"], result["compiled"]) == ("float32", False)
    assert list(result["models"]) == ["encoder", "decoder"]
    for kind, shapes in (("encoder", ENCODER), ("decoder", DECODER)):
        found = result["models"][kind]
        assert found["input"] == [2, 4]
        counts = {name: row["parameters"] for name, row in found["methods"].items()}
        assert counts == {name: sum(count(m, n) for m, n in shapes) for name, count in PARAMETERS.items()}
        assert counts["WaRA haar L1"] == counts["LoRA r=8"]
        check_ratios(found["methods"], "LoRA r=8", [*counts])
        assert list(found["to_lora_r16"]) == ["WaRA haar L1", "WaRA db4 L1"]
        assert list(found["to_lora_r40"]) == ["WaRA haar L3", "WaRA db4 L3"]
        assert found["to_wara_haar_L1"].keys() == {name for name in counts if not name.startswith(("LoRA", "WaRA"))}


def check_decode(result: dict[str, Any], _: dict[str, Any]) -> None:
    ours = [f"WaRA {name} L1{state}" for name in ("haar", "db4") for state in (", not frozen", "")]
    check_ratios(result["one_token"], "LoRA r=16", ["LoRA r=16", *ours])
    modes = [f"WaRA {name} L1{mode}" for name in ("haar", "db4") for mode in ("", ", training mode")]
    check_ratios(result["generate"], "LoRA r=16", ["LoRA r=16", *modes])
    assert list(result["microseconds_of_a_kept_factor"]) == ["checked", "unchecked"]


def check_launches(result: dict[str, Any], _: dict[str, Any]) -> None:
    assert result["counted"] == "operations"
    counts = {name: row["256 -> 256"] for name, row in result["launches"].items()}
    # The wavelet makes no difference, and LoRA has no transform.
    assert counts["WaRA haar L1"] == counts["WaRA db4 L1"]
    assert counts["WaRA haar L3"] == counts["WaRA db4 L3"]
    for dtype, lora in counts["LoRA r=16"].items():
        assert lora < counts["WaRA haar L1"][dtype] <= 4 / 3 * lora
        assert counts["WaRA haar L1"][dtype] < counts["WaRA haar L3"][dtype] <= 8 / 3 * lora
    assert {"MISS", "WAVEFT", "FOURIERFT", "VERA"} <= counts.keys()


def check_grid_step(result: dict[str, Any], _: dict[str, Any]) -> None:
    # 224 pixels in patches of 16, and the CLS token
    assert result["tokens"] == (224 // 16) ** 2 + 1
    assert (result["R"], result["blocks"], result["batch"]) == (16, 1, 1)
    check_ratios(result["methods"], "LoRA r=16", ["LoRA r=16", "WaRA grid", "WaRA grid, shared pair"])


def check_grid_sampling(result: dict[str, Any], script: dict[str, Any]) -> None:
    # latents of 32 x 32 in patches of 2 x 2
    assert (result["tokens"], result["R"], result["blocks"], result["batch"]) == (256, 16, 1, 1)
    ours = ["WaRA grid", "WaRA grid, shared pair"]
    check_ratios(result["methods"], "LoRA r=16", ["LoRA r=16", "merged LoRA", *ours])
    # Every layer's adapter is of that rank, and the model without one has none.
    assert script["variants"]["merged LoRA"] is None
    assert script["variants"]["WaRA grid"].ranks_of("ff.net.2") == dict.fromkeys(("aa1", "ad1", "da1", "dd1"), 4)


def check_experts_step(result: dict[str, Any], script: dict[str, Any]) -> None:
    assert list(result["layers"]) == ["tiny", "64 experts"]
    for found in result["layers"].values():
        experts, hidden, inner = (found["sizes"][name] for name in ("experts", "hidden", "intermediate"))
        assert found["weight_bytes"] == 4 * experts * hidden * 2 * inner
        pairs = [(2 * inner, hidden), (hidden, inner)]
        for implementation in ("grouped_mm", "eager"):
            rows = found[implementation]
            check_ratios(rows, "LoRA r=8", ["LoRA r=8", "LoRA r=16", "WaRA haar L1", "WaRA db4 L1"])
            counts = {name: row["parameters"] for name, row in rows.items()}
            for name, count in counts.items():
                assert count == experts * sum(PARAMETERS[name](m, n) for m, n in pairs)
            assert all(row["peak_bytes"] > 0 for row in rows.values())

    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self, input_ids: torch.Tensor) -> Any:
            kept = self.weight * 2.0  # 4000 bytes; the square keeps them for backward
            return SimpleNamespace(last_hidden_state=kept)

    # kept, its square (4000), the gradients of the two and of the weight: 4 or 5 of 4000 bytes, and some scalars
    assert 16_000 <= script["peak_bytes"](Doubled(), torch.zeros(1)) <= 20_500


def check_injection_time(result: dict[str, Any], _: dict[str, Any]) -> None:
    assert result["modules"] == 2 * len(DECODER)
    check_ratios(result["injection"], "LoRA r=8", ["LoRA r=8", "LoRA r=16", "WaRA haar L1", "WaRA db4 L3"])


def check_joint_projections(result: dict[str, Any], _: dict[str, Any]) -> None:
    check_ratios(result["projections"], "three products", ["three products", "one product"])


def check_export_time(result: dict[str, Any], script: dict[str, Any]) -> None:
    assert result["shapes"] == {"layers": 2, "q_proj": [48, 48], "v_proj": [32, 48], "R": 16}
    calls = ["peft.convert_to_lora", "to_lora", "to_lora, rank=16"]
    check_ratios(result["one_layer"], "to_lora", calls)
    check_ratios(result["all_layers"], "to_lora", calls[1:])
    # PEFT's time over ours is said twice.
    faster = result["times_faster_than_peft"]
    assert list(faster) == calls[1:]
    assert faster["to_lora"] == result["one_layer"]["peft.convert_to_lora"]["ratio"]

    # What is timed is the export of adapters of that rank, and the error that is told is that of an SVD of ΔW.
    for model, layers in ((script["one"], 1), (script["whole"], 2)):
        config, weights = script["to_lora"](model)
        assert config.r == result["shapes"]["R"]
        assert len(weights) == layers * 2 * 2
    squares = lost = 0.0
    for layer in script["one"].base_model.model[0].children():
        values = torch.linalg.svdvals(layer.get_delta_weight("default").double()).square()
        squares += values.sum().item()
        lost += values[8:].sum().item()
    assert result["relative_error_of_rank_8"] == pytest.approx(math.sqrt(lost / squares), rel=1e-5)


def check_import_time(result: dict[str, Any], _: dict[str, Any]) -> None:
    assert result["processes"] == 1
    # Seconds are rounded to three places and their ratio to four, each by itself: so it lies between these.
    ours, pefts, half = result["import_wara_peft_seconds"], result["import_peft_seconds"], 0.0005 + 1e-9
    least, most = max(ours - half, 0) / (pefts + half), (ours + half) / (pefts - half)
    assert least - 0.00005 - 1e-9 <= result["ratio"] <= most + 0.00005 + 1e-9


def check_layer_cost(result: dict[str, Any], _: dict[str, Any]) -> None:
    def settings(name: str, *keys: str) -> list[tuple]:
        return [tuple(row[key] for key in keys) for row in result[name]]

    variants = ("LoRA r=16", "WaRA haar L1", "WaRA db4 L1")
    assert settings("by_width", "width", "tokens", "variant") == list(product((32, 64), (4,), variants))
    assert settings("by_levels", "levels", "R", "variant") == [
        (levels, 4 * (3 * levels + 1), f"WaRA {name}") for levels in (1, 2, 3, 4) for name in ("haar", "db4")
    ]
    assert settings("by_rank", "R", "variant") == list(product((4, 8, 16, 32, 64, 128), ("LoRA", "WaRA haar")))
    assert settings("by_wavelet", "variant") == [("haar",), ("db2",), ("db4",), ("db8",), ("db16",)]
    assert settings("by_tokens", "tokens", "variant") == list(product((8, 16), ("LoRA", "WaRA haar")))
    baselines = [
        row for name in ("by_width", "by_rank", "by_tokens") for row in result[name] if row["variant"][:4] == "LoRA"
    ]
    assert len(baselines) == 2 + 6 + 2
    assert all(row["ratio"] == 1 and row["quartiles"] == [1, 1] for row in baselines)
    assert list(result["difference_to_a_real_base"]) == ["32", "64"]


def check_low_rank_memory(result: dict[str, Any], _: dict[str, Any]) -> None:
    dense, low_rank, sparse = result["training_step"]
    layers = DECODER[:4] + [(80, 32)] * 2 + [(32, 80)]
    weights = {
        "dense": [m * n for m, n in layers],
        "low-rank": [8 * (m + n) for m, n in layers],
        "sparse": [8 * (m + n) + int(0.03 * m * n) for m, n in layers],
    }
    for row, name in ((dense, "dense"), (low_rank, "low-rank"), (sparse, "sparse")):
        others = 2 * 128 * 32 + 5 * 32  # embeddings, head and norms
        numbers = 2 * sum(weights[name]) + others
        assert row["gradients"] == 4 * numbers
        places = 2 * sum(4 * int(0.03 * m * n) + 8 for m, n in layers) if name == "sparse" else 0
        assert row["weights"] == 4 * numbers + places
        assert row["optimizer"] >= 8 * numbers
        assert row["all"] == sum(row[part] for part in ("weights", "gradients", "optimizer", "saved_for_backward"))
    # Nothing but what a dense layer keeps, while a low-rank one keeps V x too.
    assert sparse["saved_for_backward"] == dense["saved_for_backward"] < low_rank["saved_for_backward"]


def check_memory(result: dict[str, Any], _: dict[str, Any]) -> None:
    found = {(row["width"], row["variant"]): row for row in result["saved_for_backward"]}
    assert len(found) == len(result["saved_for_backward"]) == 2 * 7
    for (width, variant), row in found.items():
        rank = 40 if variant.endswith(("L3", "40")) else 16
        tokens = row["tokens"]
        # Float32: the input, both factors, and the input times the first factor.
        lora = 4 * (tokens * width + 2 * rank * width + tokens * rank)
        if variant.endswith("by ptwt"):
            # ΔW lies between the input and the coefficients' own factors.
            assert row["bytes"] >= 4 * (tokens * width + width * width + rank * width)
        else:
            assert row["bytes"] == lora
        assert row["to_lora_of_same_rank"] == pytest.approx(row["bytes"] / lora, abs=1e-4)


def check_merge_memory(result: dict[str, Any], _: dict[str, Any]) -> None:
    width, layers = 64, 2
    embeddings = 2 * (8 * width) * width  # of the input and of the output
    layer = (4 + 3 * 4) * width * width + 2 * width  # attention, MLP and norms
    parameters = embeddings + layers * layer + width
    sizes = result["mebibytes"]
    assert sizes["model"] == pytest.approx(4 * parameters / 2**20, abs=0.06)
    assert sizes["largest_layer"] == round(4 * (4 * width * width) / 2**20, 1)
    # The shards' limit of 100 kB is below the size of an embedding alone, which is the largest shard.
    assert sizes["largest_shard"] == pytest.approx(4 * embeddings / 2 / 2**20, abs=0.06)
    assert list(result["peak_mebibytes_above_imports"]) == ["wara-peft merge", "merge_and_unload"]


def check_merge_error(result: dict[str, Any], _: dict[str, Any]) -> None:
    assert list(result["quantizations"]) == ["nf4", "int8"]
    ways = result["quantizations"]["nf4"]
    assert list(ways) == [f"into the {what} weights" for what in ("quantized", "16-bit", "dequantized")]
    # What is rounded to 4 bits, or lacks what 4 bits round away, is much farther off than what is rounded to bfloat16.
    *others, dequantized = (way["change"] for way in ways.values())
    assert dequantized < min(others) / 10
    assert all(way["labels_that_stay"] <= 1 for way in ways.values())


def check_compression(result: dict[str, Any], _: dict[str, Any]) -> None:
    (row,) = result["accuracy"]  # --smoke has one dense model
    ways = product(("svd", "fisher", "activation", "activation-fisher"), ("uniform", "greedy"))
    assert list(row["accuracy"]) == ["dense", *(", ".join(way) for way in ways)]
    # The four layers of one attention of MiniLM, in float32: half of their weights and biases.
    half = 4 * 4 * (384 * 384 + 384) // 2
    for solver, found in result["reconstruction"].items():
        assert 0.98 * half < found["bytes"] <= half, solver
    assert result["reconstruction"]["activation"]["mean"] < result["reconstruction"]["svd"]["mean"] < 1
    models = result["models"]
    weights = {name: found["bytes"] - models["dense"]["bytes"] for name, found in models.items()}
    for share in (0.7, 0.5, 0.3):
        saved = -weights[f"activation, greedy, {share:.0%}"]
        assert saved == pytest.approx(2 * half * (1 - share), rel=0.01) and saved >= 2 * half * (1 - share) - 4
    assert [row["width"] for row in result["growth"]] == [width for width in (8, 32, 64) for _ in range(3)]
    forward, calibrating = result["calibrating"]
    assert (forward["statistics"], calibrating["statistics"]) == ([], ["inputs", "gradients", "fisher"])
    assert forward["tokens"] == calibrating["tokens"] == 4 * 96
    # The moment of the inputs of one layer, (128, 352), is there at least, in float64.
    assert calibrating["peak_mebibytes_above_model"] > 8 * 352**2 / 2**20
    assert [(row["allocation"], row["way"]) for row in result["by_block"]] == [
        (allocation, way) for allocation in ("uniform", "greedy") for way in ("all at once", "block by block")
    ]
    for row in result["by_block"]:
        assert row["tokens"] == 2 * 32 and row["model"] > row["block"] > 0 and row["seconds"] > 0


def check_settings(result: dict[str, Any], script: dict[str, Any]) -> None:
    names = [*script["STEPS"], script["GENERATE"]]
    (setting,) = result["settings"]
    assert (setting["threads"], setting["capability"], setting["width"]) == (1, "DEFAULT", 32)
    assert list(setting["ratios"]) == list(result["ranges"]) == names
    for name, row in setting["ratios"].items():
        low, high = row["quartiles"]
        assert low <= row["ratio"] <= high
        assert result["ranges"][name] == [row["ratio"]] * 2
        assert row["ratio"] != 1  # of two variants


def check_transform_time(result: dict[str, Any], _: dict[str, Any]) -> None:
    rows = result["transforms"]
    keys = ("length", "wavelet", "levels", "dim", "operation")
    found = [tuple(row[key] for key in keys) for row in rows]
    assert len(set(found)) == len(found)
    assert set(found) == {
        (64, *wavelet, dim, operation)
        for wavelet, dim, operation in product(
            (("haar", 1), ("haar", 3), ("db4", 1), ("db4", 3), ("db8", 1), ("db16", 1)),
            (0, 1),
            ("synthesis", "adjoint"),
        )
    }
    for row in rows:
        low, high = row["quartiles"]
        assert low <= row["ratio"] <= high


def check_reparametrized(result: dict[str, Any], _: dict[str, Any]) -> None:
    lora, inside, native = result["counted"]
    assert lora["trained"] == 2 * 16 * 32 == 2 * inside["trained"] == 2 * native["trained"]
    assert (lora["added_operations"], inside["added_operations"]) == (10, 16)
    assert inside["bytes_saved_for_backward"] <= native["bytes_saved_for_backward"]
    assert len(result["training_step"]) == 3


def check_real_model(result: dict[str, Any], script: dict[str, Any]) -> None:
    base = 2 * 1000 * 32 + sum(m * n for m, n in DECODER) + 3 * 32  # embeddings, head, layers and norms
    assert result["model"] == {"name": "tiny", "parameters": base}
    assert (result["input"], result["new_tokens"]) == ([2, 4], 2)
    inside, native = "LoRA r=16, reparametrised", "WaRA r=4"
    variants = ["LoRA r=8", "LoRA r=16", native, inside]
    rows = result["training_step"]
    check_ratios(rows, "LoRA r=8", variants)
    check_ratios(
        result["generate"],
        "LoRA r=8",
        ["no adapter", f"{native}, merged", *variants, f"{inside}, in `frozen_factors`"],
    )
    for row in (rows["LoRA r=16"], result["generate"]["LoRA r=16"]):
        assert (row["ratio_to_same_rank"], row["quartiles_to_same_rank"]) == (1, [1, 1])
    lora = {r: sum(r * (m + n) for m, n in DECODER) for r in (8, 16)}
    assert [row["parameters"] for row in rows.values()] == [lora[8], lora[16], lora[8], lora[8]]
    # A file has what trains, and a header; that of a reparametrised LoRA has LoRA's own weights.
    for row, stored in zip(rows.values(), (lora[8], lora[16], lora[8], lora[16]), strict=True):
        assert 0 < row["file_bytes"] - 4 * stored < 200 * 2 * len(DECODER)

    # The variants share the frozen weights, also an embedding and a head that are tied; the merged model has its own.
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False))
    model[1].weight = model[0].weight
    (shared,) = script["sharing"](model).parameters()
    assert shared is model[0].weight


COMPRESSION_PARTS = ("accuracy", "reconstruction", "solving", "growth", "models", "calibrating", "by_block")
# script: the options that make it small, and what its result must say
SCRIPTS: dict[str, tuple[list[str], Callable[[dict[str, Any], dict[str, Any]], None]]] = {
    "compression": ([*SMOKE, "--parts", *COMPRESSION_PARTS], check_compression),
    "decode": (SMOKE, check_decode),
    "experts_step": (SMOKE, check_experts_step),
    "export_time": (SMOKE, check_export_time),
    "grid_sampling": (SMOKE, check_grid_sampling),
    "grid_step": (SMOKE, check_grid_step),
    "import_time": (["--processes", "1"], check_import_time),
    "injection_time": (SMOKE, check_injection_time),
    "joint_projections": (SMOKE, check_joint_projections),
    "launches": (["--smoke"], check_launches),
    "layer_cost": (SMOKE, check_layer_cost),
    "low_rank_memory": (["--smoke"], check_low_rank_memory),
    "memory": (["--smoke"], check_memory),
    "merge_error": (["--smoke"], check_merge_error),
    "merge_memory": (["--smoke"], check_merge_memory),
    "real_model": ([*SMOKE, "--tokens", "2"], check_real_model),
    "reparametrized": ([*SMOKE, "--tokens", "2"], check_reparametrized),
    "settings": ([*SMOKE, "--tokens", "2"], check_settings),
    "step_time": (SMOKE, check_step_time),
    "transform_time": (SMOKE, check_transform_time),
}
SLOW = {
    "compression",
    "decode",
    "grid_sampling",
    "grid_step",
    "import_time",
    "launches",
    "merge_error",
    "merge_memory",
    "real_model",
    "settings",
    "step_time",
}
# Differences of two measurements, which noise makes negative where sizes are tiny.
DIFFERENCES = ("difference_to_a_real_base", "peak_mebibytes_above_imports")


def numbers(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """All numbers of a JSON value, each with the keys that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def keys_of(value: object) -> object:
    """The keys of a JSON value at every depth; rows of a list have those of the first."""
    if isinstance(value, list):
        return [keys_of(value[0])] if value and isinstance(value[0], dict) else []
    if isinstance(value, dict):
        # Widths and shapes are keys too, and others at tiny sizes.
        sizes = re.compile(r"\d+( -> \d+)?")
        return {"size" if sizes.fullmatch(key) else key: keys_of(inner) for key, inner in value.items()}
    return None


@pytest.fixture
def run(monkeypatch):
    """Run a script of the folder as the main program, in this process; its names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # The processes that import_time and merge_memory start find the package as this one does.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def main(name: str, *options: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        return runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")

    return main


def fork_interpreters(run: Callable[..., Any]) -> Callable[..., Any]:
    """`subprocess.run`, but what it runs with this interpreter begins where the imports are done."""

    def forked(command: list[str], check: bool = False, cwd: Path = ROOT, env: Any = None, **options: Any) -> Any:
        if command[0] != sys.executable:
            return run(command, check=check, cwd=cwd, env=env, **options)
        done = run_python(*command[1:], cwd=cwd, env=env)
        if check:
            done.check_returncode()
        return done

    return forked


@pytest.mark.filterwarnings("ignore:levels=. is more than is useful")
@pytest.mark.filterwarnings("ignore:Too few samples for a regular moment")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SCRIPTS],
)
def test_wara_bench_smoke(name, run, tmp_path, capsys, monkeypatch):
    options, check = SCRIPTS[name]
    if name not in ("import_time", "settings"):  # which measure what a process chooses when it starts
        monkeypatch.setattr(subprocess, "run", fork_interpreters(subprocess.run))
        monkeypatch.setattr("multiprocessing.get_context", lambda method: FORKS)
    output = tmp_path / "new" / "result.json"
    script = run(name, *options, "--output", output)
    measured = json.loads(output.read_text())
    assert measured == json.loads(capsys.readouterr().out)
    kept = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    assert keys_of(measured) == keys_of(kept)
    for path, value in numbers(measured):
        assert math.isfinite(value), path
        assert value > 0 or path[0] in DIFFERENCES or path[-1] == "dim", path
    if name != "import_time":
        assert measured["environment"]["threads"] == torch.get_num_threads()
        assert measured["rounds"] == (3 if "--rounds" in options else 1)
    check(measured, script)


def test_there_is_a_smoke_test_of_each_script():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"harness", "markers", "models", "report", "summary"}
    results = {path.stem for path in (BENCHMARKS / "results").glob("*.json")} - {"compare_attention"}
    assert scripts == SCRIPTS.keys() == results


def test_the_readmes_table_says_what_that_of_quality_says():
    families = {
        "digits with a ViT, 300": "digits-long",
        "digits with a ViT, 80": "digits",
        "digits with a convolutional": "conv",
        "texts with MiniLM": "docstrings",
        "texts with a small Llama": "language",
        "messages with SmolLM2": "translation",
        "a planted": "planted",
    }
    detailed = (BENCHMARKS / "quality" / "README.md").read_text().partition("<!-- pooled: begin -->")[2]
    overview = (BENCHMARKS.parent / "README.md").read_text().partition("<!-- results: begin -->")[2]
    family, compared = "", 0
    header, _, *lines = overview.partition("<!-- results: end -->")[0].strip().splitlines()
    forms = {"`subband`": "WaRA subband, haar, 1", "`grid`": "WaRA grid"}
    columns = [cell.strip() for cell in header.strip("|").split("|")][2:]
    methods = [forms.get(column, column) for column in columns]
    assert methods[:4] == ["LoRA", "rsLoRA", *forms.values()]
    for line in lines:
        task, budget, *values = (cell.strip() for cell in line.strip("|").split("|"))
        family = next((name for start, name in families.items() if task.startswith(start)), family)
        rows = detailed.partition(f"\n**{family}** (")[2].partition("\n**")[0].splitlines()
        for method, value in zip(methods, values, strict=True):
            if value:
                (row,) = (row for row in rows if row.startswith(f"| {budget} | {method} |"))
                cells = [cell.strip() for cell in row.strip("|").split("|")]
                assert cells[4 if method == "LoRA" else 5].startswith(value), (line, row)
                compared += 1
    assert compared > 50


@pytest.mark.slow
def test_tables_are_what_the_results_say():
    done = run_python(BENCHMARKS / "report.py", "--check")
    assert done.returncode == 0, done.stderr
