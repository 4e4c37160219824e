"""How long is a whole training step with WaRA, beside LoRA and every other method that PEFT has for it?

    python benchmarks/step_time.py

On an encoder (MiniLM's shape) and a decoder (Llama's shape) methods take turns, in two groups, so that a round stays
short: LoRA, MiSS and WaRA; then the slower ones. LoRA r=8 and WaRA with one Haar level are in both. Ratios are to LoRA
r=8; those of one level also to LoRA r=16 and those of three to LoRA r=40, whose R is theirs, and those of others to
WaRA. `--compile` compiles each model first, `--dtype bfloat16` casts it.
"""

from __future__ import annotations

import harness
import models
import torch

BASELINE, ONE_LEVEL, THREE_LEVELS, OURS = "LoRA r=8", "LoRA r=16", "LoRA r=40", "WaRA haar L1"
FAST = (BASELINE, ONE_LEVEL, THREE_LEVELS, *models.WARA, "MiSS r=16")
NAIVE = "WaRA haar L1 by ptwt"

if __name__ == "__main__":
    parser = harness.parser(__doc__, "step_time", rounds=17)
    parser.add_argument("--compile", action="store_true", help="torch.compile each model")
    parser.add_argument("--dtype", default="float32", help="dtype of the models (default: %(default)s)")
    options = parser.parse_args()
    results = {}
    for kind, shape in (("encoder", models.encoder(options.smoke)), ("decoder", models.decoder(options.smoke))):
        configs = {**models.configs(shape.targets, options.smoke), NAIVE: None}
        tokens = torch.randint(1000, (shape.batch, shape.tokens), device=options.device)
        slow = [name for name in configs if name not in FAST]
        keys = ("methods", "to_lora_r16", "to_lora_r40", "to_wara_haar_L1")
        result: dict[str, dict[str, object]] = {key: {} for key in keys}
        for group in (FAST, (BASELINE, OURS, *slow)):
            steps, parameters = {}, {}
            for name in group:
                model = models.adapted(shape, configs[name]).to(options.device, getattr(torch, options.dtype)).train()
                parameters[name] = models.trained_parameters(model)
                steps[name] = models.training_step(torch.compile(model) if options.compile else model, tokens)
            rounds = options.rounds * (2 if group is FAST else 1)  # these are closer to each other
            seconds = harness.interleaved(steps, rounds, device=options.device)
            for name, row in harness.summary(seconds, BASELINE).items():
                result["methods"].setdefault(name, {**row, "parameters": parameters[name]})
                if not name.startswith(("LoRA", "WaRA")):
                    result["to_wara_haar_L1"][name] = harness.ratio(seconds[name], seconds[OURS])
                if name.endswith("L3"):
                    result["to_lora_r40"][name] = harness.ratio(seconds[name], seconds[THREE_LEVELS])
                if name.endswith("L1") and ONE_LEVEL in seconds:
                    result["to_lora_r16"][name] = harness.ratio(seconds[name], seconds[ONE_LEVEL])
        results[kind] = {"input": [shape.batch, shape.tokens], **result}
    harness.save(options, {"dtype": options.dtype, "compiled": options.compile, "models": results})
