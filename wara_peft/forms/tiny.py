"""`form="tiny"`, Tiny-WaRA: fixed factors from the base weight's own subbands, and a small trained core between them.

The truncated SVD C_s ≈ U_s Σ_s V_sᵀ of each subband C_s of the base weight W gives

    A_s = √Σ_s V_sᵀ,   B_s = U_s √Σ_s,        ΔW / scaling = Σ_s S_out,s (B_s R_s A_s) S_in,sᵀ,

Only the core R_s trains. It has shape (r_s, r_s), or is diagonal, and is zero at the start. All A_s and B_s of a layer
are its basis. Â is synthesised from the A_s. B̂ is synthesised from the B_s and multiplied by the block-diagonal matrix
of the cores. So all code that uses Â and B̂ of `form="subband"` works with this form too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pywt
import torch
from torch import Tensor, nn

from ..base_layers.kinds import ModuleShape
from ..base_layers.refusals import Refusal
from ..linear_algebra.svd import largest_singular
from ..wavelet import Subband, autocast_off, axis_sizes, subbands
from .base import Form, Parts, Settings, Target
from .factors import IN_DIM, OUT_DIM, SubbandFactor


class Basis(nn.Module):
    """The fixed A_s and B_s of a layer. They are buffers, so that nothing makes them trainable, in float32 or better.

    Args:
        levels: number of decomposition levels L.
        shape: shape (m, n) of the base weight.
        ranks: rank of each subband by name; subbands of rank 0 may be left out.
        saved: whether A_s and B_s are part of the state dict.

    Shapes:
        Buffers `A_level{j}`: (R_j, n_j), and `B_level{j}`: (m_j, R_j), as `SubbandFactor` keeps its parameters.
    """

    def __init__(self, levels: int, shape: tuple[int, int], ranks: Mapping[str, int], saved: bool) -> None:
        super().__init__()
        # Buffers hold NaN until values come, from the base weight or from a file. So it makes no difference who loads
        # the file. `filled` is True once it is certain that values have come.
        self.filled = False
        self.may_be_loaded = False
        self.saved = saved
        for level in range(levels + 1):
            rank = sum(rank for name, rank in ranks.items() if Subband.named(name).level == level)
            out, in_ = (axis_sizes(length, level)[-1] for length in shape)
            if rank:
                self.register_buffer(f"A_level{level}", torch.full((rank, in_), torch.nan), persistent=saved)
                self.register_buffer(f"B_level{level}", torch.full((out, rank), torch.nan), persistent=saved)

    @property
    def has_values(self) -> bool:
        """Whether values have come. Once they have, buffers are not looked at again, which would wait for the GPU."""
        if self.filled or torch.compiler.is_compiling():
            return True
        self.filled = not any(buffer.isnan().any() for buffer in self.buffers())
        return self.filled

    def rows(self, dim: int, level: int) -> Tensor:
        """All rows of A_s at a level with `dim=1`, all columns of B_s at a level with `dim=0`."""
        rows: Tensor = getattr(self, f"{'A' if dim == IN_DIM else 'B'}_level{level}")
        return rows

    def _apply(self, fn: Any, recurse: bool = True) -> Basis:
        """Move and cast the buffers, but lose no value or digit.

        A cast to less than float32 leaves the dtype as it is. PEFT sends an adapter whose base weight is offloaded to
        the meta device; such a move leaves the values where they are.
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
    """The trained R_s of a layer: for each subband a parameter with its name, (r_s, r_s), or (r_s,) if diagonal."""

    def __init__(self, ranks: Mapping[str, int], diagonal: bool) -> None:
        super().__init__()
        self.diagonal = diagonal
        self.subbands = tuple(ranks)
        for name, rank in ranks.items():
            self.register_parameter(name, nn.Parameter(torch.empty((rank,) if diagonal else (rank, rank))))

    @property
    def dtype(self) -> torch.dtype:
        return self._cores()[0].dtype

    def _cores(self) -> list[Tensor]:
        """R_s of each subband. They are read as attributes, for replicas of `nn.DataParallel` have no parameters."""
        return [getattr(self, name) for name in self.subbands]

    def forward(self, columns: Tensor) -> Tensor:
        """The basis' B̂, `columns`, (m, R), times the block-diagonal matrix of the cores, in the dtype of `columns`."""
        cores = [core.to(columns.dtype) for core in self._cores()]
        if self.diagonal:
            return columns * torch.cat(cores)
        with autocast_off([columns]):
            product: Tensor = columns @ torch.block_diag(*cores)
        return product


class TinyFactor(SubbandFactor):
    """One side of a basis with its core. It hands out Â or B̂ in the core's dtype, and has no parameters of its own."""

    def __init__(
        self, wavelet: str, levels: int, length: int, ranks: Mapping[str, int], dim: int, basis: Basis, core: Core
    ) -> None:
        super().__init__(wavelet, levels, length, ranks, dim)
        self._made_of = (basis, core)  # in a tuple, so that they are not registered as parts of this module too

    def _create_parameters(self) -> None:
        """Create none: the basis has the tensors."""

    def made_of(self, basis: Basis, core: Core) -> TinyFactor:
        """This factor, made of `basis` and `core`.

        A replica of the layer on another device has a basis and a core of its own, which its copy of this factor does
        not know yet.
        """
        if self.basis is not basis or self.core is not core:
            self._made_of = (basis, core)
        return self

    @property
    def basis(self) -> Basis:
        return self._made_of[0]

    @property
    def core(self) -> Core:
        return self._made_of[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.core.dtype

    def _rows(self, level: int) -> Tensor:
        return self.basis.rows(self.dim, level)

    def sources(self) -> tuple[Tensor, ...]:
        if self.basis._modules or self.core._modules:
            return ()
        return (*self.basis._buffers.values(), *self.core._parameters.values())  # type: ignore[arg-type]  # none is None

    def synthesise(self, dtype: torch.dtype | None = None) -> Tensor:
        factor = super().synthesise(dtype or self.dtype)
        return self.core(factor) if self.dim == OUT_DIM else factor


class TinyForm(Form):
    """ΔW / scaling = Σ_s S_out,s (B_s R_s A_s) S_in,sᵀ. Only the cores R_s train."""

    name = "tiny"
    own_fields = ("core", "save_basis", "base_weight_hashes")
    linear_only = True
    factors_are_parts = False
    not_combined: ClassVar[Mapping[str, str]] = {
        "linear": "those factors of form='tiny' are fixed. Use 'cat', which is exact."
    }

    def unsuitable(
        self, settings: Settings, model: nn.Module, shapes: Mapping[str, ModuleShape]
    ) -> dict[str, Refusal]:
        """The modules that have fewer singular values in a subband than its rank, each with the reason."""
        sentence = (
            "form='tiny' takes as many singular vectors as the rank, and there are fewer in {}. A smaller rank for "
            "them is given by `r`, `subband_ranks` or `rank_pattern`."
        )
        found = {}
        for name, shape in shapes.items():
            ranks = settings.ranks_of(name)
            for band in self.subbands(settings):
                largest = min(band.shape(*shape.lengths))
                if ranks[band.name] > largest and name not in found:
                    found[name] = Refusal(sentence, f" ({band.name}: {ranks[band.name]}, at most {largest})")
        return found

    def check_targets(self, settings: Settings, model: nn.Module, targets: Mapping[str, Target]) -> None:
        """Check the base weights too, but only those from which a basis is made."""
        for name, target in targets.items():
            if not _comes_with_the_adapter(settings, name, target.shape):
                _check_weight(name, target.weight(), target.shape)
        super().check_targets(settings, model, targets)

    def base_weight_hashes(self, settings: Settings, targets: Mapping[str, Target]) -> dict[str, str] | None:
        if settings.save_basis:
            return None
        return {name: weight_hash(target.weight()) for name, target in targets.items()}

    def create(
        self, settings: Settings, module_name: str, shape: ModuleShape, ranks: Mapping[str, int], context: Any = None
    ) -> Parts:
        in_order = {band.name: ranks[band.name] for band in subbands(settings.levels) if ranks.get(band.name, 0)}
        out, in_ = shape.lengths
        core = Core(in_order, settings.core == "diagonal")
        basis = Basis(settings.levels, shape.lengths, in_order, settings.save_basis)
        basis.may_be_loaded = _comes_with_the_adapter(settings, module_name, shape)
        return {
            "wara_A": TinyFactor(settings.wavelet, settings.levels, in_, ranks, IN_DIM, basis, core),
            "wara_B": TinyFactor(settings.wavelet, settings.levels, out, ranks, OUT_DIM, basis, core),
            "wara_basis": basis,
            "wara_core": core,
        }

    def initialise(self, parts: Parts, init_weights: bool | str) -> None:
        """Set the cores to zero, or draw them if `init_weights` is False."""
        for core in parts["wara_core"].parameters():
            (nn.init.zeros_ if init_weights else nn.init.normal_)(core)

    def may_be_loaded(self, parts: Parts) -> bool:
        return parts["wara_basis"].may_be_loaded  # type: ignore[no-any-return]

    def needs_weight(self, parts: Parts) -> bool:
        return not parts["wara_basis"].has_values

    def fill(self, parts: Parts, module_name: str, shape: ModuleShape, weight: Tensor) -> None:
        _check_weight(module_name, weight, shape)
        fill_from_weight(*self.factors(parts), weight)

    def factors(self, parts: Parts) -> tuple[TinyFactor, TinyFactor]:
        made_of = parts["wara_basis"], parts["wara_core"]
        return parts["wara_A"].made_of(*made_of), parts["wara_B"].made_of(*made_of)

    @torch.no_grad()
    def coefficients(self, parts: Parts) -> dict[str, tuple[Tensor, Tensor]]:
        """A_s and B_s R_s of each subband."""
        matrices = {
            name: core.diag() if core.ndim == 1 else core for name, core in parts["wara_core"].named_parameters()
        }
        return {
            name: (rows, columns @ matrices[name]) for name, (rows, columns) in super().coefficients(parts).items()
        }


def _comes_with_the_adapter(settings: Settings, module_name: str, shape: ModuleShape) -> bool:
    """Whether the config belongs to a saved adapter whose file, when it is loaded, brings this module's basis."""
    return settings.save_basis and (settings.module_shapes or {}).get(module_name) == shape.as_list()


def _check_weight(name: str, weight: Tensor, shape: ModuleShape) -> None:
    if weight.is_meta or tuple(weight.shape) != shape.lengths:
        raise ValueError(
            f"form='tiny' needs the weight of module {name!r}, which is on the meta device or in parts elsewhere. Add "
            "the adapter after the weights are loaded, and before they are offloaded or distributed."
        )
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"The weight of module {name!r} has values that are not finite, and no singular value decomposition for "
            "form='tiny'. Load the base model again, or leave the module out with `exclude_modules`."
        )


@torch.no_grad()
def fill_from_weight(factor_a: TinyFactor, factor_b: TinyFactor, weight: Tensor) -> None:
    """Set a basis to √Σ Vᵀ and U √Σ of the truncated SVD, in float64, of the subbands of a weight.

    A basis that is saved comes from a randomised SVD if its rank is far below the size. A basis that is not saved is
    made again from the same weight and has to come out the same, so it always comes from a full SVD.

    Args:
        factor_a, factor_b: the two factors, which have one basis.
        weight: (m, n), of any floating dtype.
    """
    basis = factor_a.basis
    basis.filled = True
    basis.to(torch.promote_types(weight.dtype, torch.float32))
    bands = _decompose(weight, factor_a.axis.wavelet, factor_a.axis.levels)
    device = weight.device if weight.is_cuda else torch.device("cpu")
    for name, rank in factor_a.ranks.items():
        u, s, v = largest_singular(torch.from_numpy(bands[name]).to(device), rank, exact=not basis.saved)
        root = s.sqrt()
        # An SVD leaves signs open. The largest entry of each column of U is made positive, so that the same weight
        # gives the same basis again.
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # (1, rank)
        factor_b.subband(name).copy_(u * sign * root)
        factor_a.subband(name).copy_((v * sign * root).T)


def _decompose(weight: Tensor, wavelet: str, levels: int) -> dict[str, np.ndarray]:
    """Subbands of a matrix by name, as PyWavelets computes them; `aa0` is the matrix itself."""
    approximation = weight.to("cpu", torch.float64).numpy()
    bands = {"aa0": approximation}
    for level in range(1, levels + 1):
        found = pywt.dwtn(approximation, wavelet, mode="periodization")
        approximation = found["aa"]
        bands |= {f"{band}{level}": value for band, value in found.items()}
    return bands


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of a weight's dtype, shape and values."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    # Bytes are hashed through a view as uint8, for NumPy has no bfloat16.
    digest.update(weight.detach().to("cpu").contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
