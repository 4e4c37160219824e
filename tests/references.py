"""What the tests compare with: transforms made by PyWavelets alone, and small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from peft import get_peft_model_state_dict
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

WAVELETS = ("haar", "db2", "db4", "sym4", "coif1")


def saved_config(model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """The config that is saved with an adapter of a model, as PEFT and transformers write it: after the tensors."""
    get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    config: dict[str, Any] = model.peft_config[adapter_name].to_dict()
    return config


def module_shapes(model: nn.Module, adapter_name: str = "default") -> dict[str, list[Any]]:
    """The shapes that are saved with an adapter of a model."""
    shapes: dict[str, list[Any]] = saved_config(model, adapter_name)["module_shapes"]
    return shapes


def sizes(length: int, levels: int) -> list[int]:
    """Lengths of an axis at the levels 0 ... levels."""
    result = [length]
    for _ in range(levels):
        result.append(-(-result[-1] // 2))
    return result


def synthesis_matrix(wavelet: str, length: int, level: int, band: str) -> np.ndarray:
    """S_{level, band}, of shape (length, d_level), column by column from pywt.idwt."""
    lengths = sizes(length, level)
    columns = []
    for unit in np.eye(lengths[level]):
        approximation, detail = (unit, None) if band == "a" else (None, unit)
        for finer in reversed(lengths[:-1]):
            approximation = pywt.idwt(approximation, detail, wavelet, mode="periodization")[:finer]
            detail = None
        columns.append(approximation)
    return np.stack(columns, axis=1)


def inverse_transform(coefficients: dict[str, np.ndarray], wavelet: str, shape: tuple[int, int], levels: int):
    """The (m, n) matrix that pywt.idwtn makes of subbands named aa{L}, ad{j}, da{j}, dd{j}; missing ones are zero."""
    rows, columns = sizes(shape[0], levels), sizes(shape[1], levels)
    current = coefficients.get(f"aa{levels}", np.zeros((rows[-1], columns[-1])))
    for level in range(levels, 0, -1):
        bands = {band: coefficients.get(f"{band}{level}") for band in ("ad", "da", "dd")}
        current = pywt.idwtn({"aa": current, **bands}, wavelet, mode="periodization")
        current = current[: rows[level - 1], : columns[level - 1]]
    return current + coefficients.get("aa0", 0.0)


def transform(matrix: np.ndarray, wavelet: str, levels: int) -> dict[str, np.ndarray]:
    """The subbands of a matrix as pywt.dwtn makes them, named aa{L}, ad{j}, da{j}, dd{j}."""
    found: dict[str, np.ndarray] = {}
    for level in range(1, levels + 1):
        bands = pywt.dwtn(matrix, wavelet, mode="periodization")
        matrix = bands.pop("aa")
        found |= {f"{band}{level}": value for band, value in bands.items()}
    return found | {f"aa{levels}": matrix}


def grid_bands(levels: int) -> list[str]:
    """Subbands of a grid in the order of an adapter's blocks."""
    return [f"aa{levels}"] + [f"{band}{level}" for level in range(1, levels + 1) for band in ("ad", "da", "dd")]


def grid_parts(signal: np.ndarray, wavelet: str, levels: int) -> np.ndarray:
    """P_s of a signal of shape (H, W) on a grid, for all subbands: (H, W, 3L + 1)."""
    found = transform(signal, wavelet, levels)
    kept = [inverse_transform({name: found[name]}, wavelet, signal.shape, levels) for name in grid_bands(levels)]
    return np.stack(kept, axis=-1)


def grid_operators(rows: int, columns: int, wavelet: str, levels: int) -> torch.Tensor:
    """P_s as dense matrices over the places of a grid, row by row: (3L + 1, H W, H W)."""
    units = np.eye(rows * columns).reshape(-1, rows, columns)
    parts = np.stack([grid_parts(unit, wavelet, levels) for unit in units])  # (unit, H, W, subband)
    return torch.from_numpy(parts).flatten(1, 2).permute(2, 1, 0)


def grid_result(
    layer: nn.Module, x: torch.Tensor, layout: tuple[int, int, int], wavelet: str = "haar", levels: int = 1
):
    """base(x) + scaling Σ_s B_s P_s(A_s x) of `form="grid"`, where x is (batch, tokens, n) and the layout is known."""
    prefix, rows, columns = layout
    operators = grid_operators(rows, columns, wavelet, levels)
    result = layer.base_layer(x)
    coefficients = layer.forms["default"].coefficients(layer.parts("default"))
    for place, name in enumerate(grid_bands(levels)):
        factor_a, factor_b = coefficients[name]
        hidden = x @ factor_a.T
        mixed = operators[place] @ hidden[:, prefix:]
        before = hidden[:, :prefix] if place == 0 else torch.zeros_like(hidden[:, :prefix])
        result = result + layer.scaling["default"] * torch.cat((before, mixed), 1) @ factor_b.T
    return result.detach()


def dense_coefficients(layer: nn.Module, adapter: str = "default") -> dict[str, np.ndarray]:
    """C_s = B_s A_s of every subband of an adapter layer, in float64."""
    factor_a, factor_b = layer.wara_A[adapter], layer.wara_B[adapter]
    return {
        name: (factor_b.subband(name).double() @ factor_a.subband(name).double()).detach().numpy()
        for name in factor_a.subbands
    }


class Mlp(nn.Module):
    """Two linear layers and a head."""

    def __init__(self, width: int = 12, hidden: int = 20, classes: int = 3) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))


def descend(loss: Callable[[], torch.Tensor], parameters: Iterable[nn.Parameter], steps: int = 8) -> None:
    """Gradient descent whose steps take off a thousandth of the loss each, to first order; that they do is checked.

    A step of -rate · g changes the loss by -rate · ‖g‖², whatever the model and its seed.
    """
    parameters = list(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = None
        before = loss()
        before.backward()
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        rate = 0.001 * before.item() / sum(gradient.square().sum().item() for _, gradient in gradients)
        with torch.no_grad():
            for parameter, gradient in gradients:
                parameter -= rate * gradient
        assert loss().item() == pytest.approx(0.999 * before.item(), rel=1e-4)


class Chain(nn.Module):
    """Five linear layers of one width."""

    def __init__(self, width: int = 8, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Conv1DModel(nn.Module):
    """transformers' Conv1D, whose weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = Conv1D(14, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def tiny_vit(image_size: int = 14, **fields) -> ViTForImageClassification:
    """Two layers of width 16; with the default image 7 x 7 patches and a CLS token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=image_size, patch_size=2, num_channels=1, num_labels=3, **sizes, **fields)
    return ViTForImageClassification(config).eval()
