"""Tiny-WaRA: factors fixed from the base weight's own subbands, and a small trained core between them.

With the truncated SVD C_s ≈ U_s Σ_s V_sᵀ of each subband C_s of the base weight W,

    A_s = √Σ_s V_sᵀ,   B_s = U_s √Σ_s,        ΔW / scaling = Σ_s S_out,s (B_s R_s A_s) S_in,sᵀ,

and only R_s trains, of shape (r_s, r_s) or diagonal, zero at the start. Â is that of the basis; B̂ is the basis' own
times the block-diagonal matrix of the cores, so that everything which serves `form="subband"` serves this form too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pywt
import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .factors import IN_DIM, OUT_DIM, SubbandFactor
from .quantization import keep_unpacked
from .wavelet import autocast_off, axis_sizes, subbands


class Basis(nn.Module):
    """The fixed A_s and B_s of a layer: buffers, so that nothing makes them trainable, of float32 or better.

    Args:
        module_name: the layer, for errors.
        levels: number of decomposition levels L.
        shape: (m, n).
        ranks: rank of each subband by name; those of rank 0 may be left out.
        saved: whether they are part of the state dict.

    Shapes:
        Buffers `A_level{j}`: (R_j, n_j), and `B_level{j}`: (m_j, R_j), as `SubbandFactor` keeps its parameters.
    """

    def __init__(
        self, module_name: str, levels: int, shape: tuple[int, int], ranks: Mapping[str, int], saved: bool
    ) -> None:
        super().__init__()
        self.module_name = module_name
        # Not a number until values come, from the base weight or from a file; `filled` once that is certain.
        self.filled = False
        for level in range(levels + 1):
            rank = sum(rank for name, rank in ranks.items() if int(name[2:]) == level)
            out, in_ = (axis_sizes(length, level)[-1] for length in shape)
            if rank:
                self.register_buffer(f"A_level{level}", torch.full((rank, in_), torch.nan), persistent=saved)
                self.register_buffer(f"B_level{level}", torch.full((out, rank), torch.nan), persistent=saved)

    def rows(self, dim: int, level: int) -> Tensor:
        """All rows of A's level with `dim=1`, all columns of B's with `dim=0`."""
        if not self.filled and not torch.compiler.is_compiling():
            if any(buffer.isnan().any() for buffer in self.buffers()):
                raise RuntimeError(
                    f"The basis of form='tiny' in module {self.module_name!r} has no values. Its config is that of a "
                    "saved adapter, whose file would have brought them; to make a new adapter with this config, set "
                    "`module_shapes=None` in it first."
                )
            self.filled = True
        rows: Tensor = getattr(self, f"{'A' if dim == IN_DIM else 'B'}_level{level}")
        return rows

    def _apply(self, fn: Any, recurse: bool = True) -> Basis:
        """Move and cast, but lose nothing.

        A cast to less than float32 leaves the dtype as it is. A move to the meta device, where PEFT sends an adapter
        whose base weight is offloaded, leaves the values where they are.
        """

        def without_loss(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            if result.is_meta:
                return tensor
            if torch.promote_types(result.dtype, torch.float32) == result.dtype:
                return result
            return tensor.to(result.device)

        super()._apply(without_loss, recurse)
        return self


class Core(nn.Module):
    """The trained R_s of a layer: one parameter a subband, named by it, of shape (r_s, r_s), or (r_s,) if diagonal."""

    def __init__(self, ranks: Mapping[str, int], diagonal: bool) -> None:
        super().__init__()
        self.diagonal = diagonal
        for name, rank in ranks.items():
            self.register_parameter(name, nn.Parameter(torch.empty((rank,) if diagonal else (rank, rank))))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, columns: Tensor) -> Tensor:
        """B̂ of the basis, (m, R), times the block-diagonal matrix of the cores, in the dtype of B̂."""
        cores = [core.to(columns.dtype) for core in self.parameters()]
        if self.diagonal:
            return columns * torch.cat(cores)
        with autocast_off([columns]):
            product: Tensor = columns @ torch.block_diag(*cores)
        return product


class TinyFactor(SubbandFactor):
    """One side of a basis with its core, which hands out Â or B̂ in the core's dtype and has no parameters itself."""

    def __init__(
        self, wavelet: str, levels: int, length: int, ranks: Mapping[str, int], dim: int, basis: Basis, core: Core
    ) -> None:
        super().__init__(wavelet, levels, length, ranks, dim)
        self._parts = (basis, core)  # in a tuple, so that they are not registered as parts of this module too

    def _create_parameters(self) -> None:
        """The basis has them."""

    @property
    def basis(self) -> Basis:
        return self._parts[0]

    @property
    def core(self) -> Core:
        return self._parts[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.core.dtype

    def _rows(self, level: int) -> Tensor:
        return self.basis.rows(self.dim, level)

    def synthesise(self, dtype: torch.dtype | None = None) -> Tensor:
        factor = super().synthesise(dtype or self.dtype)
        return self.core(factor) if self.dim == OUT_DIM else factor


def tiny_factors(
    module_name: str,
    wavelet: str,
    levels: int,
    shape: tuple[int, int],
    ranks: Mapping[str, int],
    diagonal: bool,
    saved: bool,
) -> tuple[Basis, Core, TinyFactor, TinyFactor]:
    """Basis and core of a layer, which hold its tensors, and the modules that make Â and B̂ of them.

    Args:
        module_name: the layer, for errors.
        wavelet, levels: the decomposition.
        shape: (m, n).
        ranks: rank of each subband by name.
        diagonal: whether the cores are.
        saved: whether the basis is part of the state dict.
    """
    in_order = {band.name: ranks[band.name] for band in subbands(levels) if ranks.get(band.name, 0)}
    basis, core = Basis(module_name, levels, shape, in_order, saved), Core(in_order, diagonal)
    rows = TinyFactor(wavelet, levels, shape[1], ranks, IN_DIM, basis, core)
    columns = TinyFactor(wavelet, levels, shape[0], ranks, OUT_DIM, basis, core)
    return basis, core, rows, columns


@torch.no_grad()
def fill_from_weight(rows: TinyFactor, columns: TinyFactor, weight: Tensor) -> None:
    """Set a basis to √Σ Vᵀ and U √Σ of the truncated SVD, in float64, of PyWavelets' subbands of a weight.

    Args:
        rows, columns: the factors of the basis.
        weight: (m, n), of any floating dtype. The largest entry of each column of U is made positive, so that the
            same weight gives the same basis again.
    """
    rows.basis.filled = True
    rows.basis.to(torch.promote_types(weight.dtype, torch.float32))
    bands = _decompose(weight, rows.axis.wavelet, rows.axis.levels)
    device = weight.device if weight.is_cuda else torch.device("cpu")
    for name, rank in rows.ranks.items():
        u, s, vt = torch.linalg.svd(torch.from_numpy(bands[name]).to(device), full_matrices=False)
        u, root, vt = u[:, :rank], s[:rank].sqrt(), vt[:rank]
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # (1, rank)
        columns.subband(name).copy_(u * sign * root)
        rows.subband(name).copy_(vt * sign.T * root[:, None])


def _decompose(weight: Tensor, wavelet: str, levels: int) -> dict[str, np.ndarray]:
    """PyWavelets' subbands of a matrix by name, with `aa0`, the matrix itself."""
    approximation = weight.to("cpu", torch.float64).numpy()
    bands = {"aa0": approximation}
    for level in range(1, levels + 1):
        found = pywt.dwtn(approximation, wavelet, mode="periodization")
        approximation = found["aa"]
        bands |= {f"{band}{level}": value for band, value in found.items()}
    return bands


def base_weight(base_layer: nn.Module, backend: QuantizationBackend | None) -> Tensor:
    """Weight (m, n) of a linear layer, dequantized."""
    keep_unpacked(base_layer)
    weight = cast(Tensor, base_layer.weight).data if backend is None else backend.get_base_weight(base_layer)
    return weight.T if isinstance(base_layer, Conv1D) else weight


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of a weight's dtype, shape and values."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.detach().to("cpu").contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
