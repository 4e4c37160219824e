"""Rows about training: loops, trainers, precision, memory, optimizers, and first values from data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, initialize_lora_eva_weights, prepare_model_for_kbit_training
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from transformers import Trainer, TrainingArguments

from tests.models import TOKENS, WORDS, llama, mlp
from wara_peft import initialize_from_data

from . import same_factors
from .models import ATTENTION, X, adapted, close, output, run, train
from .table import WARA, WORKS, Area, Method

AREA = Area("Training")
row = AREA.row
EXAMPLES = [{"input_ids": words, "labels": words} for words in torch.arange(1, 33).view(8, 4)]


def arguments(directory: Path, **fields: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **fields,
    }


@row("a training loop")
def loop(method: Method) -> str | None:
    train(adapted(method, llama(), init=True), WORDS)


@row("transformers' `Trainer`, and its checkpoint")
def trainer(method: Method, directory: Path) -> str | None:
    model = adapted(method, llama(), init=True)
    before = output(model, WORDS)
    Trainer(model, TrainingArguments(**arguments(directory, save_steps=2)), train_dataset=EXAMPLES).train()
    after = run(model.eval(), WORDS)
    assert not close(after, before)
    model.load_adapter(directory / "checkpoint-2", "saved")
    model.set_adapter("saved")
    assert close(run(model.eval(), WORDS), after, 1e-10)


def tokenizer() -> Any:
    """A tokenizer of forty words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{index}": index for index in range(3, 40)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


@row("TRL's `SFTTrainer`, given the config", needs="trl")
def sft(method: Method, directory: Path) -> str | None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_dict({"text": ["w3 w4 w5 w6", "w7 w8 w9 w10"] * 4})
    trainer = SFTTrainer(
        llama(),
        SFTConfig(**arguments(directory, max_length=8, bf16=False)),
        train_dataset=texts,
        processing_class=tokenizer(),
        peft_config=method.config(True, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    )
    method.finish(trainer.model, "default")
    trainer.train()
    assert not close(run(trainer.model.eval(), WORDS), output(llama(), WORDS))


@row("gradient checkpointing")
def checkpointing(method: Method) -> str | None:
    gradients = []
    for active in (False, True):
        base = llama()
        if active:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = adapted(method, base).train()
        model(**WORDS, labels=TOKENS).loss.backward()
        same_factors.meet_gradients(model)
        gradients.append([value.grad for value in model.parameters() if value.requires_grad])
    assert all(close(*pair) for pair in zip(*gradients, strict=True))


@row("autocast to bfloat16", dtype=torch.float32)
def autocast(method: Method) -> str | None:
    model = adapted(method)
    with torch.autocast("cpu", torch.bfloat16):
        result = run(model)
        result.float().square().sum().backward()
    assert result.dtype == torch.bfloat16 and close(result.double(), output(model), 0.05)
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    same_factors.meet(result)


@row("a base model in bfloat16, adapters kept in float32")
def bfloat16(method: Method) -> str | None:
    model = adapted(method, llama().bfloat16(), init=True)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    train(model, WORDS)


@row("`torch.compile(fullgraph=True)`")
def compiled(method: Method) -> str | None:
    torch._dynamo.reset()  # it remembers what it could not compile of models before
    model = adapted(method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(X)
    assert close(result, output(model))
    result.sum().backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


@row("`prepare_model_for_kbit_training`")
def kbit(method: Method) -> str | None:
    model = adapted(method, prepare_model_for_kbit_training(llama()), init=True)
    train(model, WORDS)


@row("`low_cpu_mem_usage=True` in `get_peft_model`, and loading after it")
def meta(method: Method, directory: Path) -> str | None:
    saved = adapted(method)
    saved.save_pretrained(directory)
    model = get_peft_model(mlp(), method.config(target_modules=["up", "down"]), low_cpu_mem_usage=True)
    assert {value.device.type for value in model.parameters() if value.requires_grad} == {"meta"}
    model.load_adapter(directory, "saved", low_cpu_mem_usage=True)
    method.finish(model, "saved")
    model.set_adapter("saved")
    assert torch.equal(output(model), output(saved))


def rates(optimizer: torch.optim.Optimizer, model: torch.nn.Module, name: str) -> set[float]:
    values = {id(value) for key, value in model.named_parameters() if name in key}
    groups = optimizer.param_groups
    return {group["lr"] for group in groups if any(id(value) in values for value in group["params"])}


@row(
    "`create_loraplus_optimizer(…, loraplus_lr_ratio=16)`",
    wara="differs: B gets the learning rate of A",
    instead="`wara_peft.optimizer_groups(model, lr, lr_ratio)`",
)
def loraplus(method: Method) -> str | None:
    model = adapted(method)
    output(model)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    assert rates(optimizer, model, f"{method.prefix}_A") == {0.01}
    return None if rates(optimizer, model, f"{method.prefix}_B") == {0.16} else "B gets the learning rate of A"


@row(
    "`create_lorafa_optimizer`",
    wara="differs: A trains as well",
    instead="`requires_grad_(False)` for parameters with `wara_A` in their names, and any optimizer",
    inside="refused: create_lorafa_optimizer computes with the factors of LoRA",
)
def lorafa(method: Method) -> str | None:
    model = adapted(method)
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=0.01)
    name = f"{method.prefix}_A"
    before = {key: value.detach().clone() for key, value in model.named_parameters() if name in key}
    run(model, X).sum().backward()
    optimizer.step()
    moved = any(not torch.equal(value, before[key]) for key, value in model.named_parameters() if name in key)
    return "A trains as well" if moved else None


@row(
    "`create_riemannian_optimizer`",
    wara="refused: did not find any trainable lora_A/lora_B parameter pairs",
    instead="another optimizer",
    inside="refused: create_riemannian_optimizer computes with the factors of LoRA",
)
def riemannian(method: Method) -> str | None:
    model = adapted(method)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.01)
    run(model, X).sum().backward()
    optimizer.step()


@row(
    "first values of A from the inputs of a few batches: EVA, and `initialize_from_data`",
    inside="refused: (init_lora_weights='eva' gives the first values a meaning)",
)
def from_data(method: Method) -> str | None:
    before = output(llama(), WORDS)
    model = adapted(method, llama(), init="activation" if method is WARA else "eva", r=4)
    batches = [{"input_ids": torch.randint(1, 40, (2, 6))} for _ in range(8)]
    if method is not WARA:
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    else:
        initialize_from_data(model, batches)
    assert close(output(model, WORDS), before, 1e-4)
    train(model, WORDS)


@row(
    "`initialize_lora_eva_weights`",
    wara="refused: 'WaRAConfig' object has no attribute 'init_lora_weights', which is LoRA's",
    instead='`init_weights="activation"` and `wara_peft.initialize_from_data(model, dataloader)`',
    inside="refused: (init_lora_weights='eva' gives the first values a meaning)",
)
def eva(method: Method) -> str | None:
    model = adapted(method, llama(), init=True if method is WARA else "eva", r=4)
    batches = [{"input_ids": torch.randint(1, 40, (2, 6))} for _ in range(8)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


AREA.shown_in(
    "`Trainer`: kill and resume, `load_best_model_at_end`",
    "tests/test_workflows.py",
    inside=WORKS,
    inside_test="tests/lora/test_reparametrize_checkpoints.py",
)
AREA.shown_in(
    "DDP, FSDP1 with `use_orig_params=True`, FSDP2",
    "tests/distributed/test_distributed.py",
    inside=WORKS,
    inside_test="tests/distributed/test_reparametrized.py",
)
AREA.shown_in(
    "`nn.DataParallel`",
    "tests/test_replicas.py",
    inside=WORKS,
    inside_test="tests/lora/test_reparametrize_models.py",
)
