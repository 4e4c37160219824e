"""`WaRAConfig`: every choice a user makes about WaRA adapters, checked when the object is made."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar

import regex
from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import PeftType

from .field_types import check_types
from .forms import FORMS, Form, importance_order, turns_of
from .lora_fields import Match, fields_from_lora, hint, warn_of_left_out
from .model_card import add_loading_section
from .wavelet import filters

MAX_LEVELS = 64
"""No axis is long enough for more; a config from elsewhere may ask for any number."""
MAX_RANK = 2**16
"""Likewise for the rank of a subband."""
MAX_LENGTH = 2**31
"""And for the lengths of a module's axes."""
PATTERN_SECONDS = 1.0
"""How long matching one pattern against one name may take."""


@dataclass(repr=False)
class WaRAConfig(PeftConfig):
    """Configuration of WaRA adapters (Wavelet Low-Rank Adaptation, arXiv 2506.24092).

    ΔW = scaling · Σ_s S_out,s B_s A_s S_in,sᵀ over the subbands s of an L-level 2-D wavelet decomposition. It is a
    LoRA update of rank R = Σ_s r_s, which with one rank r for all is (3L + 1) r, and 2r for `form="shared"`; scaling
    = wara_alpha / R. With `form="grid"` it is the output that changes, by scaling · Σ_s B_s P_s(A_s x), P_s being the
    parts of a wavelet transform over the grid of image patches; with `form="tiny"` B_s A_s is B_s R_s A_s, of which
    only the core R_s trains.

    Args:
        r: rank of every subband's factor pair, not LoRA's r. The default of 4 has, at one level, R = 16 and as many
            parameters as a LoRA of rank 8; a LoRA's r=16 kept as it is has R = 64, and twice its parameters.
        wara_alpha: numerator of the scaling; None means R of each module, which makes the scaling 1. It is divided by
            R, not by r: LoRA's lora_alpha=32 with r=16 is a scaling of 2, which wara_alpha=32 is for R = 16 (r=4), and
            wara_alpha=64 for as many parameters (r=8). `from_lora` works both out, and a warning says where an r
            with an alpha of r or 2r, as LoRAs have it, makes a scaling below 1. One Adam step
            moves ΔW less than in LoRA (about 0.7 of it at one level, 0.5 at three). At LoRA's learning rate an alpha
            of 1.4 R, or 2 R, made up for that in short trainings, and mattered little elsewhere (benchmarks/quality).
        use_rslora: scaling = wara_alpha / √R in place of wara_alpha / R.
        wavelet: name of an orthogonal PyWavelets wavelet.
        levels: number of decomposition levels L.
        form: "subband" (a pair for each subband), "shared" (one level, one pair for `aa1` and `dd1`), "grid" (a pair
            for each subband of the patch tokens of a vision model) or "tiny" (`subband` with A_s and B_s fixed from an
            SVD of the base weight's subbands, and a trained core between them).
        subband_ranks: ranks by subband name, such as `{"aa1": 8, "dd1": 0}`, in place of `r`; 0 leaves a subband
            out. `aa0` is the undecomposed matrix, and has rank 0 unless named: `{"aa0": 8}` adds plain LoRA's pair
            (not with "grid", whose subbands are of tokens).
        rank_pattern: by module name or regular expression, an int in place of `r` or a dict like `subband_ranks`.
            Precedence: dict in `rank_pattern`, `subband_ranks`, int in `rank_pattern`, `r`.
        alpha_pattern: by module name or regular expression, a number in place of `wara_alpha`.
        wara_dropout: dropout probability on the adapter's input.
        init_weights: True draws A as LoRA draws it, with the subband's fan-in, and sets B to zero, so that a new
            adapter changes nothing; False draws both (for tests). For `form="subband"` on linear layers also
            "orthogonal": rows of each A_s are orthonormal; or "activation": as True until
            `wara_peft.initialize_from_data` gives A_s the directions in which the inputs are largest.
        grid_pairs: with `form="grid"`, "separate" (a pair for each subband) or "shared" (one pair, and a trained gain
            for each subband and rank component; R is r).
        grid_size: with `form="grid"`, rows and columns of patches in all layers; None finds them out while the model
            runs, from its convolutions.
        num_prefix_tokens: with `form="grid"`, tokens before the patches; None counts the model's class, distillation
            and register tokens.
        core: with `form="tiny"`, R_s of shape (r, r) ("full") or its diagonal alone ("diagonal").
        save_basis: with `form="tiny"`, whether the fixed A_s and B_s are saved with the adapter; if not, they are made
            again from the base model's weights, which must be the same ones.
        target_modules: names of modules to adapt, a regular expression, or "all-linear"; None picks PEFT's defaults
            for the architecture.
        target_parameters: names of bare parameters to adapt, or ends of names, as in LoraConfig: the weights of
            experts, such as "mlp.experts.gate_up_proj", each of whose experts gets factors of its own, or matrices,
            such as a router's "gate.weight". For `form="subband"`.
        exclude_modules: names or a regular expression of modules not to adapt.
        bias: which biases train: "none", "all" or "wara_only" (those of the adapted modules).
        modules_to_save: further modules to train and save in full, such as a new classification head.
        layers_to_transform: index or indices of the layers to adapt; needs `target_modules` as a list.
        layers_pattern: name of the list of layers that `layers_to_transform` counts, such as "layers".
        trainable_token_indices: token indices to train in the embedding, as in LoraConfig.
        ensure_weight_tying: where the model ties its output layer to its input embedding and one of them is adapted
            or in `modules_to_save`, both share the adapter or the trained module, and stay tied.
        ordered_dropout: with `form="subband"`, train components (a row of A_s with its column of B_s) in an order of
            importance: each forward in training keeps in every module the first b of its R, b drawn anew. One training
            then serves every rank: `model.set_rank`, `save_as_lora(prefix=k)`. After Maestro (arXiv 2308.14929).
        component_order: with it, the order of subbands in which they take turns in that of components; None writes the
            default, coarse levels first.
        rank_penalty: with it, λ of the hierarchical group lasso λ Σ_b (‖A[b:]‖ + ‖B[:, b:]‖) over the components in
            order, which is added to the loss that the model returns while it trains.
        module_shapes: written by the library and saved with the adapter, `{module: [kind, out, in]}`. For a
            convolution `in` is that of one group, and `[kind, out, in, groups]` tells if there are several. Of a bare
            parameter it is `[kind, out, in, experts, position]`, with 0 experts for a matrix and its position among
            the parameters of its module.
        base_weight_hashes: written by the library where `save_basis` is False, `{module: SHA-256 of its weight}`.

    Raises:
        ValueError: a value is out of range, or fields contradict each other.
        TypeError: a field that WaRA does not have, or a value of the wrong type.
    """

    r: int = field(
        default=4,
        metadata={
            "help": "Rank of every subband's pair; R = (3 levels + 1) r. At one level r=4 has LoRA r=8's parameters."
        },
    )
    wara_alpha: float | None = field(
        default=None, metadata={"help": "Numerator of the scaling, which is divided by R, not by r; None means R."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(R) in place of alpha / R."})
    wavelet: str = field(default="haar", metadata={"help": "Name of an orthogonal PyWavelets wavelet."})
    levels: int = field(default=1, metadata={"help": "Number of wavelet decomposition levels."})
    form: Literal["subband", "shared", "grid", "tiny"] = field(
        default="subband",
        metadata={
            "help": "'subband': a pair for each subband; 'shared': one for aa1 and dd1; 'grid': a pair for each "
            "subband of the patch tokens; 'tiny': fixed pairs and a trained core."
        },
    )
    subband_ranks: dict[str, int] | None = field(
        default=None, metadata={"help": "Ranks by subband in place of r, such as {'aa1': 8, 'dd1': 0}."}
    )
    rank_pattern: dict[str, int | dict[str, int]] = field(
        default_factory=dict, metadata={"help": "Ranks by module name or regex: an int, or a dict by subband."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Alphas by module name or regex, in place of wara_alpha."}
    )
    wara_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the adapter's input."})
    init_weights: bool | Literal["orthogonal", "activation"] = field(
        default=True,
        metadata={
            "help": "True: a new adapter changes nothing; False: random A and B; 'orthogonal': orthonormal rows of "
            "A; 'activation': A from data, by initialize_from_data."
        },
    )
    grid_pairs: Literal["separate", "shared"] = field(
        default="separate", metadata={"help": "form='grid': a pair for each subband, or one with gains."}
    )
    grid_size: tuple[int, int] | None = field(
        default=None, metadata={"help": "form='grid': rows and columns of patches; None infers them."}
    )
    num_prefix_tokens: int | None = field(
        default=None, metadata={"help": "form='grid': tokens before the patches; None infers them."}
    )
    core: Literal["full", "diagonal"] = field(
        default="full", metadata={"help": "form='tiny': the trained core, a matrix or its diagonal."}
    )
    save_basis: bool = field(default=True, metadata={"help": "form='tiny': save the fixed factors with the adapter."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the modules to adapt, or 'all-linear'."}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of bare parameters to adapt, such as 'mlp.experts.down_proj', as in LoraConfig."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the modules not to adapt."}
    )
    bias: Literal["none", "all", "wara_only"] = field(
        default="none", metadata={"help": "Which biases train: 'none', 'all' or 'wara_only'."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full, such as a new head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that layers_to_transform counts."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token indices to train in the embedding, as in LoraConfig."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Share adapters of the embedding with layers tied to it."}
    )
    ordered_dropout: bool = field(
        default=False, metadata={"help": "Train components in order of importance, so that any first k serve."}
    )
    component_order: list[str] | None = field(
        default=None, metadata={"help": "ordered_dropout: subbands in the order in which they take turns."}
    )
    rank_penalty: float = field(
        default=0.0, metadata={"help": "ordered_dropout: factor of the hierarchical group lasso on components."}
    )
    module_shapes: dict[str, list[Any]] | None = field(
        default=None, metadata={"help": "Written by the library: {module: [kind, out, in]}."}
    )
    base_weight_hashes: dict[str, str] | None = field(
        default=None, metadata={"help": "Written by the library where save_basis=False: {module: SHA-256}."}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> WaRAConfig:
        for name, value in kwargs.items():
            remedy = hint(name, value, cls.__dataclass_fields__)
            if remedy is not None and name == "bias":
                raise ValueError(f"{remedy}.")
            if remedy is not None:
                # PEFT looks for these words to ignore unknown fields of a saved config.
                raise TypeError(f"WaRAConfig got an unexpected keyword argument {name!r}; {remedy}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        self.peft_type = PeftType.WARA  # type: ignore[attr-defined]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's tuners keep it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        # Filled by the model, as PEFT expects it, where `ensure_weight_tying` finds tied modules.
        self.modules_to_tie: set[str] | None = None
        self.target_modules_to_tie: set[str] | None = None
        if isinstance(self.grid_size, list):  # as JSON keeps it
            self.grid_size = tuple(self.grid_size)
        self._check_values()
        self._check_form()
        if self.ordered_dropout and self.component_order is None:
            self.component_order = turns_of(self.form_object.subbands(self))
        self._check_ranks()
        self._check_targets()
        self._check_shapes()
        self._warn_of_loras_alpha()

    def _warn_of_loras_alpha(self) -> None:
        """An r of one's own with an alpha of r or 2r is how LoRAs are set up; here it may be a scaling below 1."""
        rank, alpha = self.total_rank, self.wara_alpha
        saved = self.module_shapes is not None or self.inference_mode
        own_rank = self.r != type(self).__dataclass_fields__["r"].default
        if saved or self.use_rslora or self.form != "subband" or not own_rank or alpha not in (self.r, 2 * self.r):
            return
        if alpha < rank:
            warnings.warn(
                f"wara_alpha={alpha:g} with r={self.r} scales by {alpha / rank:g}, for R = {rank}. A LoRA of these "
                f"numbers scales by {alpha / self.r:g}; WaRAConfig.from_lora(LoraConfig(r={self.r}, "
                f"lora_alpha={alpha:g})) keeps its scaling and its number of parameters."
            )

    def _check_values(self) -> None:
        filters(self.wavelet)
        _check_range("levels", self.levels, 1, MAX_LEVELS)
        if not 0.0 <= self.wara_dropout < 1.0:
            raise ValueError(f"wara_dropout={self.wara_dropout!r} must be a probability, at least 0 and less than 1.")
        _check_finite("wara_alpha", self.wara_alpha or 0.0)
        _check_finite("rank_penalty", self.rank_penalty)
        if self.rank_penalty < 0:
            raise ValueError(f"rank_penalty={self.rank_penalty!r} must be at least 0.")
        for pattern, alpha in self.alpha_pattern.items():
            where = f"alpha_pattern[{pattern!r}]"
            _check_pattern(where, pattern)
            _check_finite(where, alpha)

    def _check_form(self) -> None:
        for other in FORMS.values():
            for name in other.own_fields if other is not self.form_object else ():
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no meaning with form={self.form!r}, only with "
                        f"{other.name!r}."
                    )
        if not isinstance(self.init_weights, bool) and self.init_weights not in self.form_object.initialisations:
            able = [repr(form.name) for form in FORMS.values() if self.init_weights in form.initialisations]
            raise ValueError(
                f"init_weights={self.init_weights!r} is for form={' or '.join(able)}; form={self.form!r} takes True "
                "or False."
            )
        self.form_object.check(self)

    def _check_ranks(self) -> None:
        _check_range("r", self.r, 1, MAX_RANK)
        single_pair = self.form_object.single_pair(self)
        if single_pair and self.subband_ranks is not None:
            raise ValueError(f"{single_pair} has one pair for its subbands: set `r`, and leave subband_ranks None.")
        self._check_subband_ranks("subband_ranks", self.subband_ranks or {})
        for pattern, rank in self.rank_pattern.items():
            where = f"rank_pattern[{pattern!r}]"
            _check_pattern(where, pattern)
            if isinstance(rank, int):
                _check_range(where, rank, 1, MAX_RANK)
            elif single_pair:
                raise ValueError(f"{where}={rank!r} must be an int with {single_pair}, which has a single pair.")
            else:
                self._check_subband_ranks(where, rank)
        if self.total_rank == 0 and not self.rank_pattern:
            raise ValueError(
                f"subband_ranks={self.subband_ranks!r} leaves every subband out, and nothing would be trained. "
                "Give at least one subband a rank."
            )

    def _check_subband_ranks(self, where: str, ranks: dict[str, int]) -> None:
        names = [band.name for band in self.form_object.subbands(self)]
        for name, rank in ranks.items():
            if name not in names:
                raise ValueError(
                    f"{where} names the subband {name!r}; with form={self.form!r} and levels={self.levels} there are "
                    f"{', '.join(names)}."
                )
            _check_range(f"{where}[{name!r}]", rank, 0, MAX_RANK)

    def _check_targets(self) -> None:
        by_regex = isinstance(self.target_modules, str)
        if by_regex and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if by_regex and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _check_shapes(self) -> None:
        for name, entry in (self.module_shapes or {}).items():
            kind, *sizes = entry or [None]
            # The least of each: a parameter may have no experts, and be the first.
            least = zip(sizes, (1, 1, 1) if len(sizes) < 4 else (1, 1, 0, 0), strict=False)
            whole = all(
                isinstance(size, int) and not isinstance(size, bool) and low <= size <= MAX_LENGTH
                for size, low in least
            )
            if not isinstance(kind, str) or len(sizes) not in (2, 3, 4) or not whole:
                raise ValueError(f"module_shapes has {entry!r} for {name!r}; [kind, out, in] was expected.")

    @classmethod
    def from_lora(cls, lora_config: LoraConfig, match: Match = "parameters", **fields: Any) -> WaRAConfig:
        """The config of `form="subband"` that corresponds to a LoRA's, with every module's scaling the same number.

        wara_alpha / R = lora_alpha / r, or wara_alpha / √R = lora_alpha / √r with `use_rslora`, also by
        `rank_pattern` and `alpha_pattern`. Ranks that r does not give evenly are in `subband_ranks`.

        Args:
            lora_config: the config of a LoRA.
            match: "parameters": as many parameters as the LoRA, R = 2r at one level (exactly where 2^levels divides
                both axes; an axis that it does not divide is rounded up at every level). "rank": R = r, so half as
                many parameters at one level.
            fields: `wavelet`, `levels` and other fields of the result, in place of what comes from the LoRA.

        Raises:
            TypeError: it is no `LoraConfig`.
            ValueError: `match` is something else, `form` is another than "subband", or `fields` sets ranks or alphas.

        Warns:
            UserWarning: names what the LoRA has and WaRA does not, and what to use instead.
        """
        if not isinstance(lora_config, LoraConfig):
            raise TypeError(f"lora_config is a {type(lora_config).__name__}; a LoraConfig was expected.")
        if match not in ("parameters", "rank"):
            raise ValueError(f"match={match!r} must be 'parameters' or 'rank'.")
        converted = {"r", "subband_ranks", "rank_pattern", "wara_alpha", "alpha_pattern", "use_rslora"} & fields.keys()
        if converted or fields.get("form", "subband") != "subband":
            names = ", ".join(sorted(converted)) or f"form={fields['form']!r}"
            raise ValueError(
                f"{names} cannot be given to from_lora, which works out ranks and scalings for form='subband'. Make "
                "the WaRAConfig by its own fields."
            )
        levels = fields.get("levels", 1)
        _check_range("levels", levels, 1, MAX_LEVELS)
        own, left_out = fields_from_lora(lora_config, match, levels, cls.__dataclass_fields__)
        warn_of_left_out(left_out)
        return cls(**{**own, **fields})

    @property
    def form_object(self) -> Form:
        """What the form's name stands for."""
        return FORMS[self.form]

    @property
    def total_rank(self) -> int:
        """R of a module that no pattern names: the rank of the LoRA that such a module's adapter is."""
        return self.form_object.total_rank(self, self.ranks_of(""))

    def ranks_of(self, module_name: str) -> dict[str, int]:
        """Rank of each subband in the module of that name, in the order of the form's subbands.

        Raises:
            ValueError: a pattern takes too long to match.
        """
        pattern = value_for(module_name, "rank_pattern", self.rank_pattern, self.r)
        by_subband = pattern if isinstance(pattern, dict) else {}
        rank = self.r if isinstance(pattern, dict) else pattern
        return self.form_object.ranks(self, rank, {**(self.subband_ranks or {}), **by_subband})

    def order_of(self, module_name: str) -> list[int]:
        """Rows of a module's Â, and columns of its B̂, in order of importance, as `ordered_dropout` trains them.

        Raises:
            ValueError: the adapter was trained without it, and has no such order.
        """
        if self.component_order is None:
            raise ValueError(
                "This adapter was trained without ordered_dropout=True, and has no first components. `rank` gives the "
                "best approximation of a lower rank."
            )
        ranks = {name: rank for name, rank in self.ranks_of(module_name).items() if rank}
        return importance_order(ranks, self.component_order)

    def alpha_of(self, module_name: str) -> float | None:
        """Numerator of the scaling in the module of that name, or None for that module's R.

        Raises:
            ValueError: a pattern takes too long to match.
        """
        return value_for(module_name, "alpha_pattern", self.alpha_pattern, self.wara_alpha)

    def with_ranks(self, ranks: Mapping[str, Mapping[str, int]], names: Iterable[str]) -> WaRAConfig:
        """A config with these ranks, for the modules that have any, and with the scalings of this one.

        Args:
            ranks: of each module by its full name, by subband; those that are left out are 0.
            names: names of all modules of the model.
        """
        rank_pattern: dict[str, int | dict[str, int]] = {}
        alpha_pattern: dict[str, float] = {}
        chosen = [name for name, of_module in ranks.items() if any(of_module.values())]
        for name in chosen:
            by_subband = {band.name: 0 for band in self.form_object.subbands(self)} | dict(ranks[name])
            rank = self.form_object.total_rank(self, by_subband)
            rank_pattern[exact_pattern(name)] = by_subband
            alpha = self.alpha_of(name)
            if alpha is not None or self.use_rslora:  # else the scaling is 1 at any rank
                before = scaling(alpha, self.form_object.total_rank(self, self.ranks_of(name)), self.use_rslora)
                alpha_pattern[exact_pattern(name)] = before * (math.sqrt(rank) if self.use_rslora else rank)
        tied = self.target_modules_to_tie or set()
        targets = [*chosen, *sorted(tied)]
        config = dataclasses.replace(
            copy.deepcopy(self),
            target_modules=targets,
            exclude_modules=suffix_matches(targets, names),
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            module_shapes=self.module_shapes and {name: self.module_shapes[name] for name in chosen},
        )
        config.modules_to_tie, config.target_modules_to_tie = self.modules_to_tie, self.target_modules_to_tie
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and tell in the model card that loading needs `import wara_peft`."""
        super().save_pretrained(save_directory, **kwargs)
        add_loading_section(save_directory, self.task_type)

    def __repr__(self) -> str:
        fields = ", ".join(f"{item.name}={getattr(self, item.name)!r}" for item in dataclasses.fields(self))
        return f"{type(self).__name__}(R={self.total_rank}, {fields})"


def scaling(alpha: float | None, rank: int, use_rslora: bool) -> float:
    """Factor of B̂ Â: alpha / R, or alpha / √R with `use_rslora`; an alpha of None means R."""
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if use_rslora else rank)


def exact_pattern(module_name: str) -> str:
    """The key of `rank_pattern` and `alpha_pattern` that names one module, and no other whose name ends as its."""
    return f"^{re.escape(module_name)}"


def suffix_matches(targets: Iterable[str], names: Iterable[str]) -> str | None:
    """Modules that PEFT would also take for these targets, as it compares the ends of names.

    Args:
        targets: full names of modules.
        names: names of all modules of the model.

    Returns:
        A regular expression of those that are not targets themselves, for `exclude_modules`, or None.
    """
    targets = set(targets)
    ends = tuple(f".{target}" for target in targets)
    return "|".join(re.escape(name) for name in names if name.endswith(ends) and name not in targets) or None


_Value = TypeVar("_Value")


def value_for(module_name: str, field_name: str, patterns: Mapping[str, _Value], default: _Value) -> _Value:
    """The value of the first pattern that PEFT's `get_pattern_key` would find for a module, in bounded time."""
    for pattern, value in patterns.items():
        try:
            if _compiled(rf"(.*\.)?({pattern})$").match(module_name, timeout=PATTERN_SECONDS):
                return value
        except TimeoutError:
            raise ValueError(
                f"{field_name}[{pattern!r}] takes more than {PATTERN_SECONDS} s to match against module "
                f"{module_name!r}. Write it without repetitions inside of repetitions."
            ) from None
    return default


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def _check_range(name: str, value: int, minimum: int, maximum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name}={_shown(value)} must be at least {minimum}.")
    if value > maximum:
        raise ValueError(f"{name}={_shown(value)} must be at most {maximum}.")


def _check_finite(name: str, value: float) -> None:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int beyond the floats
        finite = False
    if not finite:
        raise ValueError(f"{name}={_shown(value)} must be finite, as a float is.")


def _shown(value: float) -> str:
    """A number for a message; Python does not print the longest of ints."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1}…"
    return repr(value)


def _check_pattern(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where} is not a valid regular expression: {error}.") from error
