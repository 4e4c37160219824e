"""How long does `get_peft_model` take on a model with 224 target modules, beside LoRA?

    python benchmarks/injection_time.py

32 layers of seven projections, 256 wide. Every round builds the adapters anew on a copy of the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import harness
from models import DECODER_TARGETS
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaModel

from wara_peft import WaRAConfig

if __name__ == "__main__":
    options = harness.parser(__doc__, "injection_time").parse_args()
    width = 16 if options.smoke else 256
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "vocab_size": 100}
    model = LlamaModel(LlamaConfig(num_hidden_layers=2 if options.smoke else 32, **sizes))
    modules = sum(name.rpartition(".")[2] in DECODER_TARGETS for name, _ in model.named_modules())

    def inject(config: Callable[[], PeftConfig]) -> Callable[[], object]:
        copies = [copy.deepcopy(model) for _ in range(options.rounds + 1)]
        return lambda: get_peft_model(copies.pop(), config())

    variants = {
        "LoRA r=8": inject(lambda: LoraConfig(r=8, target_modules=DECODER_TARGETS)),
        "LoRA r=16": inject(lambda: LoraConfig(r=16, target_modules=DECODER_TARGETS)),
        "WaRA haar L1": inject(lambda: WaRAConfig(r=4, target_modules=DECODER_TARGETS)),
        "WaRA db4 L3": inject(lambda: WaRAConfig(r=4, levels=3, wavelet="db4", target_modules=DECODER_TARGETS)),
    }
    seconds = harness.interleaved(variants, options.rounds, warmup=1)
    harness.save(options, {"modules": modules, "injection": harness.summary(seconds, "LoRA r=8")})
