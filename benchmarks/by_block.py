"""What does compressing SmolLM2 block by block take, beside compressing it as a whole?

    python benchmarks/by_block.py

Each way runs in a process of its own, from a directory with the model to a directory with the compressed one. Memory
is the peak above that of the process before, which has imported all libraries.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import smollm2
from docstring_data import load_docstrings

METHODS = {"uniform": 'Activation(0.6, allocation="uniform")', "greedy": "Activation(0.6)"}
WAYS = {
    "all at once": """
from transformers import AutoModelForCausalLM
from wara_peft.compression import calibrate, compress, save_compressed
model = AutoModelForCausalLM.from_pretrained(base)
compress(model, method, calibrate(model, batches, show_progress_bar=False), show_progress_bar=False)
save_compressed(model, out)
""",
    "block by block": """
from wara_peft.compression import compress_by_block
compress_by_block(base, out, method, batches, show_progress_bar=False)
""",
}
RUN = """
import sys, time, warnings
import torch
import transformers.models.llama.modeling_llama
from wara_peft.compression import Activation
warnings.filterwarnings("ignore", "Too few samples for a regular moment")
base, out = sys.argv[1] + "/base", sys.argv[1] + "/out"
batches, method = torch.load(sys.argv[1] + "/batches.pt"), {method}
def memory(name):
    (size,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith(name))
    return int(size) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak is that of now on
before, start = memory("VmRSS"), time.perf_counter()
{way}
print(time.perf_counter() - start, memory("VmHWM") - before)
"""


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    count, length = (2, 32) if options.smoke else (32, 256)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
        if options.smoke:
            model.model.layers = model.model.layers[:2]
            model.config.num_hidden_layers = 2
        model.save_pretrained(f"{folder}/base")
        sizes = {
            "model": sum(parameter.nbytes for parameter in model.parameters()),
            "largest block": sum(parameter.nbytes for parameter in model.model.layers[0].parameters()),
        }
        text = "\n".join(entry.text for entry in load_docstrings(max_per_class=15 if options.smoke else 60).train)
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, : count * length]
        torch.save([{"input_ids": rows} for rows in tokens.reshape(-1, length).split(4)], f"{folder}/batches.pt")
        for allocation, method in METHODS.items():
            for way, code in WAYS.items():
                program = RUN.format(method=method, way=code)
                done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                seconds, peak = map(float, done.stdout.split()[-2:])
                row = {"allocation": allocation, "way": way, "seconds": seconds, "peak_mebibytes": peak}
                rows.append({**row, "tokens": len(tokens), **sizes})
                print(row, flush=True)
                shutil.rmtree(f"{folder}/out")
    return rows


def main() -> None:
    options = harness.parser(__doc__, "by_block", rounds=1).parse_args()
    harness.save(options, {"ways": measure(options)})


if __name__ == "__main__":
    main()
