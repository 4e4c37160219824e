"""How long is a whole training step with WaRA, beside LoRA and every other method that PEFT has for it?

    python benchmarks/step_time.py

On an encoder (MiniLM's shape) and a decoder (Llama's shape) all methods take turns; ratios are to LoRA r=8, those of
three levels also to LoRA r=40, whose R is theirs, and those of the spectral methods to WaRA. `--compile` compiles each
model first, `--dtype bfloat16` casts it.
"""

from __future__ import annotations

import harness
import models
import torch

BASELINE, THREE_LEVELS = "LoRA r=8", "LoRA r=40"

if __name__ == "__main__":
    parser = harness.parser(__doc__, "step_time")
    parser.add_argument(
        "--methods", nargs="*", help="only these, by name (default: all); LoRA r=8 and r=40 always run"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile each model")
    parser.add_argument("--dtype", default="float32", help="dtype of the models (default: %(default)s)")
    options = parser.parse_args()
    results = {}
    for kind, shape in (("encoder", models.encoder(options.smoke)), ("decoder", models.decoder(options.smoke))):
        found = {**models.configs(shape.targets, options.smoke), "WaRA haar L1 by ptwt": None}
        chosen = {BASELINE, THREE_LEVELS, *(options.methods if options.methods is not None else found)}
        tokens = torch.randint(1000, (shape.batch, shape.tokens), device=options.device)
        steps, parameters = {}, {}
        for name in [name for name in found if name in chosen]:
            model = models.adapted(shape, found[name]).to(options.device, getattr(torch, options.dtype)).train()
            parameters[name] = models.trained_parameters(model)
            steps[name] = models.training_step(torch.compile(model) if options.compile else model, tokens)
        seconds = harness.interleaved(steps, options.rounds, device=options.device)
        results[kind] = {
            "input": [shape.batch, shape.tokens],
            "methods": {
                name: {**row, "parameters": parameters[name]}
                for name, row in harness.summary(seconds, BASELINE).items()
            },
            "to_lora_r40": {
                name: harness.ratio(seconds[name], seconds[THREE_LEVELS]) for name in seconds if name.endswith("L3")
            },
            "to_wara_haar_L1": {
                name: harness.ratio(seconds[name], seconds["WaRA haar L1"])
                for name in ("WaveFT", "FourierFT", "MiSS r=16")
                if name in seconds and "WaRA haar L1" in seconds
            },
        }
    harness.save(options, {"dtype": options.dtype, "compiled": options.compile, "models": results})
