"""Train a class-conditional diffusion transformer, or an adapter of one, and sample from it, in diffusers' manner."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, skip_first_batches
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from tqdm.auto import tqdm

DDIM_STEPS = 25
SAMPLING_BATCH = 128
CHECKPOINT = "checkpoint-"


@dataclass(frozen=True)
class Training:
    """How long, and how. `seed` decides the order of the images and the noise, at equal seeds the same for all models.

    Attributes:
        learning_rate: at its peak, after a twentieth of the steps; from there it falls to 0 along a cosine.
        checkpoint_steps, validation_steps: how often to write a checkpoint, and to call `validate`.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    checkpoint_steps: int = 500
    validation_steps: int = 500


def train(
    model: nn.Module,
    noise_scheduler: DDPMScheduler,
    images: Tensor,
    labels: Tensor,
    training: Training,
    folder: Path,
    validate: Callable[[nn.Module, int], object] | None = None,
) -> float:
    """Train what requires gradients to tell the noise from images (N, C, H, W) with labels (N,); return the seconds.

    Goes on from the last checkpoint that an interrupted run left in the folder, and ends with the same weights as one
    that was not. A checkpoint has the trained weights alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    torch.manual_seed(training.seed + accelerator.process_index)  # for dropout of labels
    processes = accelerator.num_processes
    order = torch.Generator().manual_seed(training.seed)
    examples = training.steps * training.batch_size * processes
    sampler = RandomSampler(images, replacement=True, num_samples=examples, generator=order)
    loader = DataLoader(TensorDataset(images, labels), training.batch_size, sampler=sampler, generator=order)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, training.learning_rate, weight_decay=0.0)
    # accelerate takes a step of the schedule for each process.
    warmup, steps = training.steps // 20 * processes, training.steps * processes
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    keep_trained_weights_alone(accelerator)
    step = 0
    if checkpoint := last_checkpoint(folder):
        accelerator.load_state(str(checkpoint))
        step = number(checkpoint)
        loader = skip_first_batches(loader, step)

    start = time.perf_counter()
    prepared.train()
    progress = tqdm(
        loader, folder.name, training.steps, initial=step, leave=False, disable=not accelerator.is_main_process
    )
    for pixels, classes in progress:
        # A generator for each step: nothing has to be restored for the noise to be the same after an interruption.
        generator = torch.Generator().manual_seed(
            (training.seed * training.steps + step) * processes + accelerator.process_index
        )
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        timesteps = torch.randint(len(noise_scheduler), (len(pixels),), generator=generator).to(pixels.device)
        noisy = noise_scheduler.add_noise(pixels, noise, timesteps)
        loss = F.mse_loss(
            predict(prepared, noisy, timesteps, classes), target(noise_scheduler, pixels, noise, timesteps)
        )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % training.checkpoint_steps == 0 and step < training.steps:
            save_checkpoint(accelerator, folder, step)
        if validate and step % training.validation_steps == 0 and accelerator.is_main_process:
            validate(accelerator.unwrap_model(prepared), step)
            prepared.train()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()
    return time.perf_counter() - start


def predict(model: nn.Module, noisy: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
    """What the model takes for the noise (or the velocity); a second half of the channels would be its variance."""
    return model(noisy, timestep=timesteps, class_labels=classes).sample[:, : noisy.shape[1]]


def target(noise_scheduler: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    kind = noise_scheduler.config.prediction_type
    return noise_scheduler.get_velocity(images, noise, timesteps) if kind == "v_prediction" else noise


# Checkpoints


def keep_trained_weights_alone(accelerator: Accelerator) -> None:
    """Have accelerate's checkpoints hold what requires gradients, and not the base model."""

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        model = accelerator.unwrap_model(models[0])
        trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        if accelerator.is_main_process:
            save_file(trained, Path(folder, "trained.safetensors"))
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        accelerator.unwrap_model(models.pop()).load_state_dict(
            load_file(Path(folder, "trained.safetensors")), strict=False
        )

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write one in whole or not at all, and then remove the one before."""
    unfinished = folder / "unfinished"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        before = last_checkpoint(folder)
        unfinished.rename(folder / f"{CHECKPOINT}{step}")
        if before:
            shutil.rmtree(before)


def last_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob(f"{CHECKPOINT}*"), key=number, default=None)


def number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob(f"{CHECKPOINT}*"):
        shutil.rmtree(checkpoint)


# Models and samples


def load_base(name: str) -> tuple[DiTTransformer2DModel, DDPMScheduler, AutoencoderKL | None]:
    """Transformer, noise scheduler and, where it works on latents, VAE of a DiT from the Hub or a local folder."""
    transformer = DiTTransformer2DModel.from_pretrained(name, subfolder="transformer")
    scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
    latent = transformer.config.in_channels not in (1, 3)
    vae = AutoencoderKL.from_pretrained(name, subfolder="vae").eval() if latent else None
    return transformer, scheduler, vae


def load_images(folder: Path, channels: int, size: int) -> tuple[list[str], Tensor, Tensor]:
    """Names of classes, pixels (N, channels, size, size) between -1 and 1 and labels, from a folder for each class."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = [(path, label) for label, name in enumerate(names) for path in sorted(Path(folder, name).iterdir())]
    if not found:
        raise ValueError(f"{folder} has no images: there must be a folder for each class")
    mode = "L" if channels == 1 else "RGB"
    pictures = [ImageOps.fit(Image.open(path).convert(mode), (size, size)) for path, _ in found]
    pixels = [torch.from_numpy(np.array(picture)).view(size, size, channels).permute(2, 0, 1) for picture in pictures]
    return names, torch.stack(pixels) / 127.5 - 1, torch.tensor([label for _, label in found])


@torch.no_grad()
def encoded(pixels: Tensor, vae: AutoencoderKL | None) -> Tensor:
    """What the transformer sees: latents, or the pixels themselves."""
    if vae is None:
        return pixels
    parts = [vae.encode(image).latent_dist.mean for image in pixels.split(1)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def decoded(images: Tensor, vae: AutoencoderKL | None) -> Tensor:
    if vae is None:
        return images
    return torch.cat([vae.decode(image / vae.config.scaling_factor).sample for image in images.split(1)])


@torch.no_grad()
def sample(model: nn.Module, noise_scheduler: DDPMScheduler, labels: Tensor, seed: int, config: Any) -> Tensor:
    """Images, or latents, (N, C, H, W) of these classes (N,) by DDIM; equal seeds begin with the same noise."""
    scheduler = DDIMScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(DDIM_STEPS)
    device = next(model.parameters()).device
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    model.eval()
    parts = []
    for part, classes in zip(noise.split(SAMPLING_BATCH), labels.split(SAMPLING_BATCH), strict=True):
        part, classes = part.to(device), classes.to(device)
        for timestep in scheduler.timesteps:
            prediction = predict(model, part, timestep.expand(len(part)).to(device), classes)
            part = scheduler.step(prediction, timestep, part).prev_sample
        parts.append(part.cpu())
    return torch.cat(parts)


def save_grid(images: Tensor, columns: int, path: Path, size: int = 64) -> None:
    """A picture of images (N, C, H, W) between -1 and 1, in rows."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    pictures = [Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy()) for image in levels]
    make_image_grid(pictures, len(pictures) // columns, columns, resize=size).save(path)
