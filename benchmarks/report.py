"""Turn all results into the tables of the README, of pages in docs/ and of `benchmarks/README.md`, and into plots.

    python benchmarks/report.py

Reads benchmarks/results/*.json, writes tables between their markers, and PNG files into benchmarks/results/.
`--check` writes nothing, and fails if a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from markers import replaced
from matplotlib.figure import Figure
from quality.cells import Cell, Store

# Examples report their own runs.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from compress_report import SEEDS as HEALING_SEEDS
from compress_report import table as healing
from diffusion_report import SEEDS as DIFFUSION_SEEDS
from diffusion_report import table as diffusion
from low_rank_report import SEEDS as TRAINING_SEEDS
from low_rank_report import table as training
from segment_report import SEEDS as SEGMENTATION_SEEDS
from segment_report import table as segmentation
from summary import summary_table

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


Value = float | tuple[float, float]
"""A ratio, or the least and the largest one over settings."""


def target_rows() -> list[tuple[str, Value, str, bool]]:
    """Each measurement that has a target: what, value, target, met."""
    ranges = {name: (low, high) for name, (low, high) in load("settings")["ranges"].items()}
    steps, layer, memory, decode = load("step_time"), load("layer_cost"), load("memory"), load("decode")
    encoder = steps["models"]["encoder"]
    rows: list[tuple[str, Value, float]] = []
    name = "training step, encoder of MiniLM's shape, WaRA r=4 {} / LoRA r=8 (as many parameters)"
    rows.append((name.format("Haar, 1 level"), encoder["methods"]["WaRA haar L1"]["ratio"], 0.97))
    rows.append((name.format("db4, 1 level"), encoder["methods"]["WaRA db4 L1"]["ratio"], 1.00))
    name = "the same, WaRA r=4 {} (R = 40) / LoRA r=40"
    rows.append((name.format("Haar, 3 levels"), encoder["to_lora_r40"]["WaRA haar L3"], 1.03))
    rows.append((name.format("db4, 3 levels"), encoder["to_lora_r40"]["WaRA db4 L3"], 1.10))
    name = "training step, Llama-shaped decoder, WaRA r=4 Haar, 1 level / LoRA r=8"
    rows.append((name, ranges["step, haar L1 / LoRA r=8"], 0.96))
    rows.append(("the same / LoRA r=16 of the same R", ranges["step, haar L1 / LoRA r=16"], 1.00))
    name = "the same, WaRA r=4 db4, 3 levels (R = 40) / LoRA r=40"
    rows.append((name, ranges["step, db4 L3 / LoRA r=40"], 1.08))
    for variant in ("WaRA haar L1", "WaRA db4 L1"):
        found = [row for row in layer["by_width"] if row["variant"] == variant]
        worst = max(found, key=lambda row: row["ratio"])
        where = f"worst of {len(found)}: width {worst['width']}, {worst['tokens']} tokens"
        rows.append((f"an adapter's own cost, {variant} / LoRA r=16 of the same R ({where})", worst["ratio"], 1.00))
    saved = [row for row in memory["saved_for_backward"] if row["variant"] in ("WaRA haar L1", "WaRA db4 L3")]
    worst = max(saved, key=lambda row: row["to_lora_of_same_rank"])
    rows.append(("bytes saved for backward / LoRA of the same R (worst)", worst["to_lora_of_same_rank"], 1.01))
    inside = [row for row in load("reparametrized")["training_step"] if "reparametrised" in row["variant"]]
    worst = (min(row["ratio"] for row in inside), max(row["ratio"] for row in inside))
    name = "training step of one decoder layer, widths 256 to 1536, LoRA r=16 reparametrised / plain"
    rows.append((name, worst, 1.05))
    frozen = load("reparametrized")["generate"]["LoRA r=16, reparametrised"]["ratio"]
    rows.append(("`generate` inside `frozen_factors`, LoRA r=16 reparametrised / plain", frozen, 1.05))
    tokens = decode["one_token"]
    rows.append(("decoding a token inside `frozen_factors` / LoRA r=16", tokens["WaRA haar L1"]["ratio"], 1.02))
    name = "the same outside of it (reported, no target)"
    rows.append((name, tokens["WaRA haar L1, not frozen"]["ratio"], math.inf))
    name = f"`generate` of {decode['new_tokens']} tokens{{}}, with no scope / LoRA r=16"
    rows.append((name.format(""), ranges["generate, haar L1 / LoRA r=16"], 1.03))
    in_training_mode = decode["generate"]["WaRA haar L1, training mode"]["ratio"]
    rows.append((name.format(" in training mode"), in_training_mode, 1.03))
    injection = load("injection_time")
    name = f"injection into {injection['modules']} modules / LoRA r=8"
    rows.append((name, injection["injection"]["WaRA haar L1"]["ratio"], 1.20))
    name = '`form="grid"`, training step on ViT-B\'s shapes / LoRA r=16'
    rows.append((name, load("grid_step")["methods"]["WaRA grid"]["ratio"], 1.15))
    name = '`form="grid"`, sampling step on DiT-B\'s shapes / LoRA r=16, both unmerged (reported, no target)'
    rows.append((name, load("grid_sampling")["methods"]["WaRA grid"]["ratio"], math.inf))
    table = [
        (what, value, "" if limit == math.inf else f"≤ {limit:.2f}", largest(value) <= limit)
        for what, value, limit in rows
    ]
    for peer in ("WaveFT", "FourierFT"):
        value = encoder["to_wara_haar_L1"][peer]
        table.append((f"training step, encoder, {peer} / WaRA Haar, 1 level", value, "≥ 1.70", value >= 1.7))
    seconds = load("import_time")["import_wara_peft_seconds"]
    table.append(("seconds of `import wara_peft` after `import peft`", seconds, "≤ 0.10", seconds <= 0.1))
    faster = load("export_time")["times_faster_than_peft"]["to_lora"]
    table.append(("`peft.convert_to_lora` / exact export, time", faster, "≥ 100", faster >= 100))
    return table


def targets_table() -> str:
    lines = ["| measured | ratio | target | met |", "|---|---|---|---|"]
    for what, value, target, met in target_rows():
        lines.append(f"| {what} | {shown(value)} | {target} | {verdict(target, met)} |")
    return "\n".join(lines)


def largest(value: Value) -> float:
    return value[1] if isinstance(value, tuple) else value


def shown(value: Value) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.3f} to {value[1]:.3f}"
    return f"{value:,.0f}" if value > 100 else f"{value:.3f}"


def settings_table() -> str:
    """The ratios in each setting, from `settings.json`."""
    result = load("settings")
    names = list(result["ranges"])
    lines = [f"| threads | instructions | width | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for setting in result["settings"]:
        ratios = (setting["ratios"][name] for name in names)
        cells = [f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f}–{row['quartiles'][1]:.2f})" for row in ratios]
        name = f"{setting['threads']} | {setting['capability'].lower()} | {setting['width']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(target: str, met: bool) -> str:
    return "" if not target else "yes" if met else "**no**"


def methods_table() -> str:
    """All methods on both models."""
    models = load("step_time")["models"]
    lines = [
        "| method | trained, encoder | step, encoder | trained, decoder | step, decoder |",
        "|---|---|---|---|---|",
    ]
    for name in models["encoder"]["methods"]:
        cells = []
        for kind in ("encoder", "decoder"):
            row = models[kind]["methods"][name]
            cells += [
                f"{row['parameters']:,}",
                f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f}–{row['quartiles'][1]:.2f})",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def slope(rows: list[dict[str, Any]], x: str) -> float:
    """Exponent b of seconds ≈ a xᵇ, by least squares on logarithms."""
    points = np.log([[row[x], row["median_seconds"]] for row in rows])
    return float(np.polyfit(points[:, 0], points[:, 1], 1)[0])


def growth_table() -> str:
    """How an adapter's own cost grows, from `layer_cost.json`."""
    cost = load("layer_cost")
    lines = ["| over | WaRA (Haar) | LoRA of the same R |", "|---|---|---|"]

    def both(rows: list[dict[str, Any]], wara: str, lora: str, x: str) -> str:
        by_variant = [[row for row in rows if row["variant"] == name] for name in (wara, lora)]
        return " | ".join(f"time ∝ {x}^{slope(found, x):.2f}" for found in by_variant)

    at_512 = [row for row in cost["by_width"] if row["tokens"] == min(r["tokens"] for r in cost["by_width"])]
    lines.append(f"| width, 512 tokens | {both(at_512, 'WaRA haar L1', 'LoRA r=16', 'width')} |")
    lines.append(f"| tokens, width 2048 | {both(cost['by_tokens'], 'WaRA haar', 'LoRA', 'tokens')} |")
    lines.append(f"| R, width 2048, 512 tokens | {both(cost['by_rank'], 'WaRA haar', 'LoRA', 'R')} |")
    for wavelet in ("haar", "db4"):
        found = [row for row in cost["by_levels"] if row["variant"] == f"WaRA {wavelet}"]
        ratios = ", ".join(f"L={row['levels']}: {row['ratio']:.2f}" for row in found)
        lines.append(f"| levels, {wavelet}, each beside LoRA of its R | ratio {ratios} | 1 |")
    ratios = ", ".join(f"{row['variant']}: {row['ratio']:.2f}" for row in cost["by_wavelet"])
    lines.append(f"| wavelet, one level, R = 16 | ratio {ratios} | 1 |")
    return "\n".join(lines)


def own_cost_table() -> str:
    """An adapter's own cost, by width and tokens."""
    cells = {(row["variant"], row["tokens"], row["width"]): row["ratio"] for row in load("layer_cost")["by_width"]}
    variants, tokens, widths = (list(dict.fromkeys(key[i] for key in cells)) for i in range(3))
    lines = [f"| an adapter's own cost / LoRA r=16, width | {' | '.join(map(str, widths))} |"]
    lines.append("|---" * (len(widths) + 1) + "|")
    for variant in variants[1:]:
        for count in tokens:
            ratios = [f"{cells[variant, count, width]:.2f}" for width in widths]
            lines.append(f"| {variant}, {count} tokens | {' | '.join(ratios)} |")
    return "\n".join(lines)


def plots() -> dict[str, Figure]:
    cost, memory, steps = load("layer_cost"), load("memory"), load("step_time")["models"]
    figures = {}

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for variant in ("LoRA r=16", "WaRA haar L1", "WaRA db4 L1"):
        for tokens, style in zip(sorted({row["tokens"] for row in cost["by_width"]}), "-:", strict=False):
            found = [r for r in cost["by_width"] if r["variant"] == variant and r["tokens"] == tokens]
            axes.loglog([r["width"] for r in found], [r["median_seconds"] for r in found], f"o{style}",
                        label=f"{variant}, {tokens} tokens")  # fmt: skip
    axes.set(xlabel="width", ylabel="seconds", title="An adapter's own cost of a training step")
    axes.legend(fontsize=7)
    figures["cost_by_width"] = figure

    figure = Figure(figsize=(9, 4))
    left, right = figure.subplots(1, 2)
    for wavelet in ("haar", "db4"):
        found = [r for r in cost["by_levels"] if r["variant"] == f"WaRA {wavelet}"]
        left.plot([r["levels"] for r in found], [r["ratio"] for r in found], "o-", label=wavelet)
    left.set(xlabel="levels (R = 4 (3 L + 1))", ylabel="ratio to LoRA of the same R", title="Cost against levels")
    left.axhline(1, color="grey", linewidth=0.8)
    left.legend()
    for variant in ("LoRA", "WaRA haar"):
        found = [r for r in cost["by_rank"] if r["variant"] == variant]
        right.loglog([r["R"] for r in found], [r["median_seconds"] for r in found], "o-", label=variant)
    right.set(xlabel="R", ylabel="seconds", title="Cost against R")
    right.legend()
    figures["cost_by_levels_and_rank"] = figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    tokens = max(row["tokens"] for row in memory["saved_for_backward"])
    for variant in dict.fromkeys(row["variant"] for row in memory["saved_for_backward"]):
        found = [r for r in memory["saved_for_backward"] if r["variant"] == variant and r["tokens"] == tokens]
        axes.loglog([r["width"] for r in found], [r["bytes"] / 2**20 for r in found], "o-", label=variant)
    axes.set(xlabel="width", ylabel="MiB", title=f"Saved for backward by one layer, {tokens} tokens")
    axes.legend(fontsize=7)
    figures["memory"] = figure

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    methods = sorted(steps["encoder"]["methods"].items(), key=lambda item: item[1]["ratio"], reverse=True)
    axes.barh([name for name, _ in methods], [row["ratio"] for _, row in methods])
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="training step, as a ratio to LoRA r=8", title="Encoder of MiniLM's shape")
    figures["step_time"] = figure
    return figures


def comparison_table() -> str:
    """What `examples/compare_attention.py` found."""
    found = load("compare_attention")
    lines = [
        "| setting | model | parameters of the attention | trained | accuracy, 95% interval | training | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        accuracy = f"{row['accuracy_mean']:.3f} ± {row['accuracy_interval']:.3f}"
        lines.append(
            f"| {row['setting']} | {row['model']} | {row['attention_parameters']:,} | {row['trained_parameters']:,} "
            f"| {accuracy} | {row['training_seconds']:.1f} s | {row['tokens_per_second']:,.0f} |"
        )
    lengths = [step["length"] for step in found["step_times"]]
    lines += [
        "",
        f"| step / full attention, length | {' | '.join(map(str, lengths))} |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for name in ("low-rank", "Linformer"):
        ratios = [f"{step['ratio'][name]:.2f}" for step in found["step_times"]]
        lines.append(f"| {name} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def segmentation_table() -> str:
    """What `examples/segment.py --full` found."""
    return segmentation(reported("segmentation", SEGMENTATION_SEEDS))


def diffusion_table() -> str:
    """What `examples/train_diffusion.py --full` found."""
    return diffusion(reported("diffusion", DIFFUSION_SEEDS))


def training_table() -> str:
    """What `examples/train_low_rank.py` found."""
    return training(reported("low_rank_training", TRAINING_SEEDS))


def healing_table() -> str:
    """What `examples/compress_and_heal.py --full` found."""
    return healing([line for line in healing_lines() if "stored" not in line])


def smollm2_table() -> str:
    """What `examples/compress_and_heal.py --models smollm2` has found by now."""
    return healing([line for line in healing_lines() if "stored" in line])


def healing_lines() -> list[dict[str, Any]]:
    return list(reported("compress_and_heal", HEALING_SEEDS).values())


def reported(family: str, seeds: range) -> dict[Cell, dict[str, Any]]:
    """The kept runs of these seeds."""
    results = Store(RESULTS, RESULTS).results()
    return {cell: result for cell, result in results.items() if cell.family == family and cell.seed in seeds}


def merge_table() -> str:
    """How far each way of merging moves the logits, by the quantization that the adapter was trained beside."""
    found = load("merge_error")["quantizations"]
    lines = [f"| ΔW is added | {' | '.join(f'{name}: logits move by | labels that stay' for name in found)} |"]
    lines.append("|---|" + "---|---|" * len(found))
    for way in next(iter(found.values())):
        cells = [f"{row[way]['change']:.2%} | {row[way]['labels_that_stay']:.1%}" for row in found.values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def real_model_table() -> str:
    """Steps and `generate` with SmolLM2, from `real_model.json`."""
    found = load("real_model")

    def ratios(row: dict[str, Any]) -> list[str]:
        keys = (("ratio", "quartiles"), ("ratio_to_same_rank", "quartiles_to_same_rank"))
        return [f"{row[ratio]:.3f} ({row[ends][0]:.3f}–{row[ends][1]:.3f})" for ratio, ends in keys]

    lines = [
        "| training step | trained | file | step / LoRA r=8 | step / LoRA r=16 | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["training_step"].items():
        cells = [f"{row['parameters']:,}", f"{row['file_bytes'] / 1e6:.1f} MB", *ratios(row)]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['peak_mebibytes']:,.0f} MiB |")
    lines += ["", f"| `generate` of {found['new_tokens']} tokens | / LoRA r=8 | / LoRA r=16 |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join(ratios(row))} |" for name, row in found["generate"].items()]
    return "\n".join(lines)


def growth_tables() -> str:
    return f"{methods_table()}\n\n{own_cost_table()}\n\n{growth_table()}"


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"results": summary_table},
    ROOT / "docs" / "speed.md": {"benchmarks": targets_table, "real model": real_model_table},
    ROOT / "docs" / "attention.md": {"comparison": comparison_table},
    ROOT / "docs" / "compression.md": {"healing": healing_table, "smollm2": smollm2_table},
    ROOT / "docs" / "quantized.md": {"merging": merge_table},
    ROOT / "docs" / "training_low_rank.md": {"training": training_table},
    ROOT / "docs" / "vision.md": {"segmentation": segmentation_table, "diffusion": diffusion_table},
    HERE / "README.md": {"benchmarks": growth_tables, "settings": settings_table},
}
"""Which file has which table between the markers of its name; quality/README.md is written by quality/report.py."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not up to date")
    options = parser.parse_args()
    tables = {path: {name: table() for name, table in of_file.items()} for path, of_file in TABLES.items()}
    texts = {path: replaced(path, of_file) for path, of_file in tables.items()}
    if options.check:
        stale = [str(path) for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
        sys.exit(f"Run benchmarks/report.py: not up to date: {', '.join(stale)}" if stale else 0)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    for name, figure in plots().items():
        figure.savefig(RESULTS / f"{name}.png", bbox_inches="tight", dpi=110)
    print(targets_table())
