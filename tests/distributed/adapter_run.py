"""Short training runs for the tests of distributed training, on one or several processes on the CPU.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.adapter_run ddp OUTPUT_DIR

Each method has a run. Every process takes its share of the same batches. The first writes the mean losses to
OUTPUT_DIR/METHOD/losses.json, and the adapter, gathered from all, to OUTPUT_DIR/METHOD/adapter.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.vit.modeling_vit import ViTLayer

from tests.models import llama
from wara_peft import RankSchedule, WaRAConfig, reparametrize_lora

CONFIGS = {
    "wara": lambda: WaRAConfig(target_modules="all-linear", wavelet="db2", wara_alpha=64),
    "lora": lambda: LoraConfig(target_modules="all-linear", r=8, lora_alpha=64),
    "tiny": lambda: WaRAConfig(form="tiny", target_modules="all-linear", wavelet="db2", wara_alpha=64),
    "schedule": lambda: WaRAConfig(target_modules="all-linear", r=6, wara_alpha=64),
    "reparametrized": lambda: LoraConfig(target_modules="all-linear", r=8, lora_alpha=64),
    "reparametrized_dora": lambda: LoraConfig(target_modules="all-linear", r=8, lora_alpha=64, use_dora=True),
    "grid": lambda: WaRAConfig(form="grid", grid_pairs="shared", target_modules=["q_proj", "fc1"], wara_alpha=64),
}
SHARDED = ("fsdp1", "fsdp2")
"""Kinds whose parameters are sharded, which `RankSchedule` does not take."""
BLOCKS = (LlamaDecoderLayer, ViTLayer)


def base_model(method: str = "wara") -> nn.Module:
    torch.manual_seed(0)
    if method == "grid":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=40, **sizes))
    return llama().train()


def build(method: str) -> PeftModel:
    base = base_model(method)
    torch.manual_seed(1)
    model = get_peft_model(base, CONFIGS[method]())
    if method.startswith("reparametrized"):
        reparametrize_lora(model, wavelet="db2")
    return model


def batches() -> torch.Tensor:
    return torch.randint(0, 40, (6, 8, 10), generator=torch.Generator().manual_seed(0))


def inputs_of(method: str, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of tokens as it is, or each of its rows as an image, of the class that its first token is."""
    if method == "grid":
        numbers = torch.arange(64)
        pixels = torch.sin(batch.float() @ torch.outer(torch.arange(1, 11), numbers).float())
        return {"pixel_values": pixels.view(-1, 1, 8, 8), "labels": batch[:, 0]}
    return {"input_ids": batch, "labels": batch}


def distributed(model: PeftModel, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=set(BLOCKS))
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    if kind == "fsdp2":
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.modules():
            if isinstance(module, BLOCKS):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def whole_state(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """Parameters gathered from all processes, by their names in the model that was not distributed."""
    if kind == "fsdp1":
        # Its own full state dict crashes in PyTorch 2.13 on the CPU, with any adapter or none.
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {
                name.replace("_fsdp_wrapped_module.", ""): parameter.detach().clone()
                for name, parameter in model.named_parameters()
            }
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model.module if kind == "ddp" else model, options=options)


def train(kind: str, method: str, output_dir: Path, rank: int, processes: int) -> None:
    model = distributed(build(method), kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = RankSchedule(like=LoraConfig(r=4), warmup=1, final=2, interval=1) if method == "schedule" else None
    if schedule and kind in SHARDED:
        try:
            schedule.start(model, len(batches()))
        except ValueError as error:
            if rank == 0:
                output_dir.mkdir(parents=True, exist_ok=True)
                (output_dir / "refused.txt").write_text(str(error))
        return
    if schedule:
        schedule.start(model.module if kind == "ddp" else model, len(batches()))
    losses = []
    for batch in batches():
        share = batch.chunk(processes)[rank]
        loss = model(**inputs_of(method, share)).loss
        loss.backward()
        if schedule:
            schedule.before_step()
        optimizer.step()
        if schedule:
            schedule.after_step(optimizer)
        optimizer.zero_grad()
        mean = loss.detach() / processes
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())

    if schedule:
        schedule.finish()
    state = {} if schedule else whole_state(model, kind)
    if rank == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "losses.json").write_text(json.dumps(losses))
        whole = (model.module if kind == "ddp" else model) if schedule else build(method)
        whole.load_state_dict(state, strict=False)
        whole.save_pretrained(output_dir / "adapter")
    if processes > 1:
        dist.barrier()


def main(kind: str, output_dir: Path) -> None:
    torch.set_num_threads(1)
    rank, processes = 0, 1
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank, processes = dist.get_rank(), dist.get_world_size()
    for method in CONFIGS:
        train(kind, method, output_dir / method, rank, processes)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["single", "ddp", "fsdp1", "fsdp2"])
    parser.add_argument("output_dir", type=Path)
    options = parser.parse_args()
    main(options.kind, options.output_dir)
