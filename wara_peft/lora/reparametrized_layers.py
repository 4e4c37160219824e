"""LoRA's factors as layers whose weight is computed from coefficients in the wavelet domain.

PEFT keeps `lora_A[name]` and `lora_B[name]` as linear layers or convolutions. The classes here are subclasses of
these, with a module `factor` in the place of the parameter `weight`:

    weight = Â, (R, n, *kernel), for lora_A,        weight = B̂, (m, R), for lora_B,        as in `forms.factors`

The parameters are the coefficients, half as many numbers at one level. All else is as in the plain layer: its weight
can be read and written, and a state dict has it under the key `weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..forms import ExpertsFactor, SubbandFactor
from ..forms.factors import IN_DIM
from ..wavelet import is_transformed
from .computed_weight import ComputedWeight, read_weight
from .factor_optimizers import refuse_factor_optimizers
from .sharded_coefficients import belongs_to_fsdp1, gathered, is_flat, is_whole, placed_like, sharded_weight
from .span import describe_distance, factor_from_weight, nearest_coefficients, rounding_tolerance

FACTOR = "factor"
"""Name, in a reparametrised layer, of the module with the coefficients."""


class ReparametrizedLayer(nn.Module):
    """A linear layer or convolution whose weight is computed from coefficients.

    `reparametrize` gives a plain layer this class in place, so that its hooks, its bias and its settings stay.

    Attributes:
        factor: the coefficients.
        weight_size: shape of the weight.
        name: name of the layer in the model, for errors.
        remembered: while a checkpoint is loaded, coefficients from a file beside it. They count if they make its
            weight.
        last_read: for `computed_weight`.
        gives_way: whether the layer becomes plain where a weight is written that no coefficients make, if it does not
            train.
    """

    factor: SubbandFactor
    weight_size: torch.Size
    name: str
    remembered: Mapping[str, Tensor] | None = None
    gives_way: bool = False
    last_read: tuple[ComputedWeight, torch.device, bool] | None = None

    def reparametrize(self, name: str, factor: SubbandFactor) -> None:
        """Take a factor in the place of the plain weight that the layer still has as a parameter."""
        self.name, self.weight_size = name, self._parameters.pop("weight").shape  # type: ignore[union-attr]
        self.factor = factor
        refuse_factor_optimizers(self)

    def __getstate__(self) -> dict[str, Any]:
        """Called for copies and for what is pickled: a tensor that was read belongs to this layer."""
        return {name: value for name, value in vars(self).items() if name != "last_read"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called for copies and for what is unpickled."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        refuse_factor_optimizers(self)

    def restore(self) -> None:
        """Be the plain layer again, with the weight as a parameter."""
        weight = nn.Parameter(self.computed(), self.sample().requires_grad)
        for name in ("weight_size", "name", "last_read", "gives_way"):
            vars(self).pop(name, None)
        del self.factor
        self.__class__ = next(plain for plain, own in CLASSES.items() if own is type(self))  # type: ignore[assignment]
        self.weight = weight

    # Reading.

    @property
    def weight(self) -> Tensor:
        """Â or B̂. Reads are differentiable, and writes reach the coefficients: see `computed_weight`."""
        sample = self.sample()
        if torch.compiler.is_compiling() or is_transformed() or isinstance(sample, FakeTensor):
            return self._as_weight(self.factor())
        return read_weight(self, sample)

    @weight.setter
    def weight(self, value: Any) -> None:
        # A parameter comes to `register_parameter`. Anything else `nn.Module` refuses for a parameter.
        raise TypeError(
            f"The weight of {self.name!r} can be assigned an nn.Parameter, not a {type(value).__name__}. "
            "`torch.func.functional_call` takes the names of `model.named_parameters()`."
        )

    def weight_shape(self) -> torch.Size:
        return self.weight_size

    def coefficients(self) -> list[nn.Parameter]:
        return [rows for rows in self.factor.coefficients() if rows is not None]  # type: ignore[misc]

    def sample(self) -> Tensor:
        """One of the coefficients, which tells dtype, device and whether they train."""
        # PEFT asks for the dtype in every forward, so this goes the short way.
        for rows in self._modules[FACTOR]._parameters.values():  # type: ignore[union-attr]
            return rows  # type: ignore[return-value]  # none is None
        return self.coefficients()[0]

    def computed(self) -> Tensor:
        """The weight as a new plain tensor, of all ranks' parts where the coefficients are sharded."""
        with self._put_together(modifier_rank=None):
            # A replica of `nn.DataParallel` has plain tensors in the place of parameters.
            levels = enumerate(self.factor.coefficients())
            return self.made_of({f"level{level}": rows for level, rows in levels if rows is not None})

    def _put_together(self, modifier_rank: int | None) -> AbstractContextManager[None]:
        """A scope in which this process has all values that DeepSpeed's stage 3 keeps in several.

        Args:
            modifier_rank: the process whose changes all get; None if there are none.
        """
        parameters = list(self.factor.parameters())
        # DeepSpeed would scatter, at the end, also what an outer scope has put together.
        return gather_params_ctx(parameters, modifier_rank) if any(map(is_flat, parameters)) else nullcontext()

    @torch.no_grad()
    def made_of(self, coefficients: Mapping[str, Tensor]) -> Tensor:
        """The weight that coefficients make, by the names of the factor's parameters, as a new plain tensor."""
        levels = [coefficients.get(f"level{level}") for level in range(len(self.factor.axis.bands))]
        self._check_is_put_together(coefficients)
        whole = [None if rows is None else gathered(rows) for rows in levels]
        # Without transformed rows a factor is its parameter, which a reader must not get.
        return self._as_weight(self.factor.synthesis_of(whole)).clone(memory_format=torch.contiguous_format)

    def gradients(self, grad: Tensor) -> list[Tensor]:
        found = [rows for rows in self.factor.adjoint(self._as_factor(grad)) if rows is not None]
        return [placed_like(rows, like) for rows, like in zip(found, self.coefficients(), strict=True)]

    def _check_is_put_together(self, coefficients: Mapping[str, Tensor]) -> None:
        if any(map(is_flat, coefficients.values())):
            raise RuntimeError(
                f"The weight of {self.name!r} is computed from coefficients of which this process has a part. With "
                "FSDP1, use it inside `FullyShardedDataParallel.summon_full_params(model)`; with DeepSpeed's stage 3, "
                "inside `deepspeed.zero.GatheredParameters(list(model.parameters()))`."
            )

    # Writing.

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Set the coefficients so that this is the weight.

        Raises:
            ValueError: the weight has another shape, or no coefficients make it.
            RuntimeError: this process has a flat part of the coefficients.
        """
        self.prepared(weight)()

    def prepared(self, weight: Tensor) -> Callable[[], None]:
        """Check a write, and return what does it, so that several writes can be checked before the first is done.

        Raises:
            ValueError, RuntimeError: as `write` does.
        """
        with self._put_together(modifier_rank=None):
            self._check_is_put_together(dict(self.factor.named_parameters()))
        try:
            return partial(self._put, self.coefficients_of(weight))
        except ValueError:
            sample = self.sample()
            can_give_way = self.gives_way and not sample.requires_grad and is_whole(sample)
            if not can_give_way or weight.shape != self.weight_size:
                raise
            return partial(self._become_plain, weight)

    @torch.no_grad()
    def _put(self, coefficients: Mapping[str, Tensor]) -> None:
        with self._put_together(modifier_rank=0):
            for level, rows in coefficients.items():
                getattr(self.factor, level).copy_(rows)
            self.factor.keeping.changed()

    @torch.no_grad()
    def _become_plain(self, weight: Tensor) -> None:
        self.restore()
        self.weight.copy_(weight)

    @torch.no_grad()
    def coefficients_of(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters of the factor, by name, that make this weight.

        Where the present ones make it, to the precision of its dtype, these are what is returned.

        Raises:
            ValueError: the weight has another shape, or no coefficients make it.
        """
        sample = self.sample()
        weight = gathered(weight)
        if weight.shape != self.weight_size:
            raise ValueError(
                f"The weight of {self.name!r} has shape {tuple(self.weight_size)}, and cannot become one of shape "
                f"{tuple(weight.shape)}. Take `wara_peft.plain_lora(model)` first to change the rank."
            )
        present: dict[str, Tensor] = dict(self.factor.named_parameters())
        if self.remembered is not None and torch.equal(self.made_of(self.remembered).to(weight), weight):
            return {level: placed_like(rows, present[level]) for level, rows in self.remembered.items()}
        if not (sample.is_meta or is_flat(sample)) and torch.equal(self.computed().to(weight), weight):
            return present
        distance, found = nearest_coefficients(self.factor, self._as_factor(weight.detach()))
        if not distance <= rounding_tolerance(self.factor, weight):
            raise ValueError(
                f"The weight of {self.name!r} cannot become this one: {describe_distance(self.factor, distance)}. "
                "Nothing is written. To set any values, take `wara_peft.plain_lora(model)` first. Then "
                "`wara_peft.reparametrize_lora(model, project=True)` trains the nearest ones in the wavelet domain."
            )
        device = weight.device if sample.is_meta else sample.device
        return {
            f"level{level}": placed_like(rows.to(device, sample.dtype).contiguous(), present[f"level{level}"])
            for level, rows in enumerate(found)
            if rows is not None
        }

    def is_placeholder(self, weight: Tensor) -> bool:
        """Whether a weight in a state dict stands for one that ZeRO-3 keeps elsewhere, as `state_dict` has it."""
        return not weight.numel() and is_flat(self.sample())

    # The layout of PEFT's weights.

    def _as_factor(self, weight: Tensor) -> Tensor:
        return factor_from_weight(self.factor, weight)

    def _as_weight(self, values: Tensor) -> Tensor:
        if isinstance(self.factor, ExpertsFactor):
            values = values.flatten(0, 1) if self.factor.dim == IN_DIM else values.permute(1, 2, 0).flatten(1)
        return values if values.ndim == len(self.weight_size) else values.view(self.weight_size)

    # What PyTorch does with a module.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Write what others register as the weight, as they do by assigning a parameter."""
        if name != "weight" or FACTOR not in self._modules:
            super().register_parameter(name, param)
        elif param is None:
            raise ValueError(f"The weight of {self.name!r} cannot be None.")
        else:
            self.write(param)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        # PyTorch calls this method for every module inside of the one that is saved.
        result = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        sample = self.sample()
        if not belongs_to_fsdp1(sample):  # FSDP1 asserts that each of its parameters is there, by its name
            for key in self.factor.state_dict(prefix=f"{prefix}{FACTOR}."):
                del result[key]
        if is_flat(sample):
            # Processes may save without each other, so nothing is gathered. Plain LoRA has an empty weight here too.
            if not belongs_to_fsdp1(sample):
                result[f"{prefix}weight"] = sample.detach()
        elif kwargs.get("keep_vars"):
            result[f"{prefix}weight"] = self.weight
        else:
            result[f"{prefix}weight"] = sharded_weight(self.computed(), sample)
        return result

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        # `load_state_dict` gives each module a dict of its own, and makes that of `factor` from it after this.
        # Who gathers parameters by their names loads coefficients.
        weight = state_dict.pop(f"{prefix}weight", None)
        present = {f"{prefix}{FACTOR}.{level}": rows for level, rows in self.factor.named_parameters()}
        if weight is not None and not self.is_placeholder(weight):
            made = self.coefficients_of(weight)
            state_dict |= {f"{prefix}{FACTOR}.{level}": rows for level, rows in made.items()}
        elif not all(key in state_dict for key in present):
            state_dict |= present
            if weight is None and strict:
                missing_keys.append(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *others)


class ReparametrizedLinear(ReparametrizedLayer, nn.Linear):
    """`nn.Linear`, one of whose axes lies in the wavelet domain."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.factor(), self.bias)


class _ReparametrizedConv(ReparametrizedLayer, nn.modules.conv._ConvNd):
    """The forward of all convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self._as_weight(self.factor()), self.bias)


class ReparametrizedConv1d(_ReparametrizedConv, nn.Conv1d):
    """`nn.Conv1d`, whose channels lie in the wavelet domain."""


class ReparametrizedConv2d(_ReparametrizedConv, nn.Conv2d):
    """`nn.Conv2d`, whose channels lie in the wavelet domain."""


class ReparametrizedConv3d(_ReparametrizedConv, nn.Conv3d):
    """`nn.Conv3d`, whose channels lie in the wavelet domain."""


CLASSES: Mapping[type[nn.Module], type[ReparametrizedLayer]] = {
    nn.Linear: ReparametrizedLinear,
    nn.Conv1d: ReparametrizedConv1d,
    nn.Conv2d: ReparametrizedConv2d,
    nn.Conv3d: ReparametrizedConv3d,
}
"""The classes of layers that PEFT's LoRA has as factors, and their like here."""
