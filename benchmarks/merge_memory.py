"""How much memory does `wara-peft merge` need, beside loading the model and `merge_and_unload`?

    python benchmarks/merge_memory.py

A Llama-shaped model with random weights is saved in shards, with an adapter on all of its linear layers. Each way of
merging runs in a process of its own, whose peak resident memory is what the operating system recorded, less that of a
process that only imports the libraries.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import harness
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from wara_peft import WaRAConfig

IMPORTS = """
import resource, wara_peft, wara_peft_cli.app, wara_peft.disk.adapters.merge
from peft import AutoPeftModelForCausalLM
"""
PEAK = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
WAYS = {
    "imports alone": "",
    "wara-peft merge": "wara_peft.disk.adapters.merge.merge_checkpoint('base', 'adapter', 'merged')",
    "merge_and_unload": """
model = AutoPeftModelForCausalLM.from_pretrained('adapter').merge_and_unload()
model.save_pretrained('merged-in-memory')
""",
}


def make(directory: Path, smoke: bool) -> dict[str, float]:
    """A sharded base and an adapter; sizes in MiB."""
    width, layers, shard = (64, 2, "100KB") if smoke else (1024, 16, "64MB")
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "vocab_size": 8 * width,
        "num_hidden_layers": layers,
    }
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=8, **sizes))
    model.save_pretrained(directory / "base", max_shard_size=shard)
    model.name_or_path = "base"
    config = WaRAConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(model, config).save_pretrained(directory / "adapter")
    shards = [path.stat().st_size / 2**20 for path in (directory / "base").glob("*.safetensors")]
    layer = 4 * width * width * 4 / 2**20
    return {"model": round(sum(shards), 1), "largest_shard": round(max(shards), 1), "largest_layer": round(layer, 1)}


if __name__ == "__main__":
    options = harness.parser(__doc__, "merge_memory", rounds=1).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        # A process inherits the peak of the one that starts it, so what makes the model is a process as well.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            mebibytes = pool.submit(make, Path(directory), options.smoke).result()
        peaks = {}
        for name, code in WAYS.items():
            command = [sys.executable, "-c", f"{IMPORTS}\n{code}\n{PEAK}"]
            done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            peaks[name] = float(done.stdout.split()[-1])
    imports = peaks.pop("imports alone")
    above = {name: round(peak - imports, 1) for name, peak in peaks.items()}
    harness.save(options, {"mebibytes": mebibytes, "peak_mebibytes_above_imports": above})
