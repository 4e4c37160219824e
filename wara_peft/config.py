"""`WaRAConfig`: every choice a user makes about WaRA adapters, checked when the object is made."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import PeftType

from .arguments import check_whole_number
from .compiled import plain_names
from .config_fields.checks import MAX_LEVELS, check_config
from .config_fields.field_help import with_help
from .config_fields.field_types import Json, check_types, read_json
from .config_fields.from_lora import (
    LORA_FIELDS,
    Match,
    fields_from_lora,
    hint_for_keyword,
    subband_ranks,
    warn_of_left_out,
)
from .config_fields.model_card import add_loading_section
from .config_fields.name_patterns import exact_pattern, in_any_order, suffix_matches, value_for
from .config_fields.removed_fields import without_removed_fields
from .config_fields.resolution import Resolution, config_to_write
from .forms import FORMS, Form

NAMING = (
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "rank_pattern",
    "alpha_pattern",
    "module_shapes",
    "base_weight_hashes",
    "biased_modules",
)
"""Fields that hold names of modules, or patterns for such names."""


@with_help
@without_removed_fields
@dataclass(repr=False)
class WaRAConfig(PeftConfig):
    """Configuration of WaRA adapters (Wavelet Low-Rank Adaptation, arXiv 2506.24092).

    An adapter adds ΔW = scaling · Σ_s S_out,s B_s A_s S_in,sᵀ to a weight W. The sum runs over the subbands s of an
    L-level 2-D wavelet decomposition. A_s and B_s train and have rank r_s; the fixed S_in,s and S_out,s are the
    wavelet synthesis of the subband along each axis. So ΔW is a LoRA update of rank R = Σ_s r_s, and scaling =
    wara_alpha / R. One rank r for all subbands gives R = (3L + 1) r, or R = 2r with `form="shared"`.

    Two forms differ. `form="grid"` changes the layer's output by scaling · Σ_s B_s P_s(A_s x), where P_s takes the
    part in subband s of a wavelet transform over the grid of image patches. `form="tiny"` puts a core R_s between B_s
    and A_s, and trains only the core.

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
        wavelet: name of an orthogonal PyWavelets wavelet, such as "haar", "db4", "sym4" or "coif1".
        levels: number of decomposition levels L.
        form: "subband" (a pair for each subband), "shared" (one level, one pair for `aa1` and `dd1`), "grid" (a pair
            for each subband of the patch tokens of a vision model) or "tiny" (`subband` with A_s and B_s fixed from an
            SVD of the base weight's subbands, and a trained core between them).
        subband_ranks: ranks by subband name, such as `{"aa1": 8, "dd1": 0}`, in place of `r`; 0 leaves a subband
            out. `aa0` is the undecomposed matrix, and has rank 0 unless named: `{"aa0": 8}` adds plain LoRA's pair
            (not with "grid", whose subbands are of tokens).
        rank_pattern: by module name or regular expression, an int in place of `r` or a dict like `subband_ranks`.
            Precedence: dict in `rank_pattern`, `subband_ranks`, int in `rank_pattern`, `r`. Of several that match a
            module the first counts, also after saving, which writes them so that their order is free.
        alpha_pattern: by module name or regular expression, a number in place of `wara_alpha`, as in `rank_pattern`.
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
        module_shapes: written by the library when the adapter is saved, `{module: [kind, out, in]}`. For a
            convolution `in` is that of one group, and `[kind, out, in, groups]` tells if there are several. Of a bare
            parameter it is `[kind, out, in, experts, position]`, with 0 experts for a matrix and its position among
            the parameters of its module.
        base_weight_hashes: written likewise where `save_basis` is False, `{module: SHA-256 of its weight}`.
        biased_modules: written likewise where biases train, the adapted modules that have one.

    Raises:
        ValueError: a value is out of range, or fields contradict each other.
        TypeError: a field that WaRA does not have, or a value of the wrong type.
    """

    r: int = 4
    wara_alpha: float | None = None
    use_rslora: bool = False
    wavelet: str = "haar"
    levels: int = 1
    form: Literal["subband", "shared", "grid", "tiny"] = "subband"
    subband_ranks: dict[str, int] | Json | None = None
    rank_pattern: dict[str, int | dict[str, int]] | Json = field(default_factory=dict)
    alpha_pattern: dict[str, float] | Json = field(default_factory=dict)
    wara_dropout: float = 0.0
    init_weights: Literal[True, False, "orthogonal", "activation"] = True
    grid_pairs: Literal["separate", "shared"] = "separate"
    grid_size: tuple[int, int] | Json | None = None
    num_prefix_tokens: int | None = None
    core: Literal["full", "diagonal"] = "full"
    save_basis: bool = True
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    bias: Literal["none", "all", "wara_only"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | Json | int | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[int] | Json | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    module_shapes: dict[str, list[Any]] | None = None
    base_weight_hashes: dict[str, str] | None = None
    biased_modules: list[str] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> WaRAConfig:
        # The dataclass makes `__init__`, whose error would name no remedy; `__new__` sees the keywords before it.
        for name, value in kwargs.items():
            remedy = hint_for_keyword(name, value, cls.__dataclass_fields__)
            if remedy is not None and name == "bias":
                raise ValueError(f"{remedy}.")
            if remedy is not None:
                # By these words PEFT recognises unknown fields of a saved config, which it then ignores.
                raise TypeError(f"WaRAConfig got an unexpected keyword argument {name!r}; {remedy}.")
        return super().__new__(cls)

    if not TYPE_CHECKING:  # else a type checker would take every attribute for a valid one

        def __getattr__(self, name: str) -> Any:
            """Name the remedy when code made for LoRA, such as PEFT's XLoRA or EVA, reads a field of LoRA's."""
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            remedy = LORA_FIELDS.get(name)
            if remedy is not None:
                message = (
                    f"{message}, which is LoRA's: {remedy}. What reads it takes only LoRA: give it the adapter as "
                    "one, by `wara_peft.save_as_lora`, or train a LoRA, with `wara_peft.reparametrize_lora`"
                )
            raise AttributeError(message)

    def __post_init__(self) -> None:
        read_json(self)
        # An adapter saved while its model was compiled by `torch.compile(model)` may have `_orig_mod` in its names.
        for name in NAMING:
            setattr(self, name, plain_names(getattr(self, name)))
        check_types(self)
        super().__post_init__()
        self.peft_type = PeftType.WARA  # type: ignore[attr-defined]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's tuners keep it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        # The model fills these two, as PEFT expects, if `ensure_weight_tying` is set and modules are tied. They are no
        # fields of the dataclass, so they are not saved.
        self.modules_to_tie: set[str] | None = None
        self.target_modules_to_tie: set[str] | None = None
        self.resolution: Resolution | None = None  # set by the last model that used this config
        if isinstance(self.grid_size, list):  # JSON has no tuples
            self.grid_size = tuple(self.grid_size)
        check_config(self)

    @classmethod
    def from_lora(cls, lora_config: LoraConfig, match: Match = "parameters", **fields: Any) -> WaRAConfig:
        """Make the config of `form="subband"` that corresponds to a LoRA's, and scales every module as the LoRA does.

        wara_alpha / R = lora_alpha / r, or wara_alpha / √R = lora_alpha / √r with `use_rslora`, also in modules that
        `rank_pattern` or `alpha_pattern` names. If the subbands need unequal ranks, `subband_ranks` holds them.

        Args:
            lora_config: the config of a LoRA.
            match: "parameters": as many parameters as the LoRA, R = 2r at one level (exactly where 2^levels divides
                both axes; an axis that it does not divide is rounded up at every level). "rank": R = r, so half as
                many parameters at one level.
            fields: `wavelet`, `levels` and other fields of the result, in place of what comes from the LoRA.

        Raises:
            TypeError: `lora_config` is no `LoraConfig`.
            ValueError: `match` has no such value, `form` is another than "subband", or `fields` sets ranks or alphas.

        Warns:
            UserWarning: names the settings of the LoRA that WaRA does not have, and what to use instead.
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
        check_whole_number("levels", levels, 1, MAX_LEVELS)
        ranks_for = partial(subband_ranks, match=match, levels=levels)
        own, left_out = fields_from_lora(lora_config, ranks_for, cls.__dataclass_fields__)
        warn_of_left_out(left_out)
        with warnings.catch_warnings():
            # That warning is for a LoRA's numbers copied by hand. Here the scaling is the LoRA's own.
            warnings.filterwarnings("ignore", "wara_alpha=.* scales by")
            return cls(**{**own, **fields})

    @property
    def form_object(self) -> Form:
        """The `Form` that the field `form` names."""
        return FORMS[self.form]

    @property
    def total_rank(self) -> int:
        """The rank R that the adapter has as a LoRA, in a module that no pattern matches."""
        return self.form_object.total_rank(self, self.ranks_of(""))

    def ranks_of(self, module_name: str) -> dict[str, int]:
        """Return the rank of each subband in the module of that name, in the order of the form's subbands.

        Raises:
            ValueError: a pattern takes too long to match.
        """
        pattern = value_for(module_name, "rank_pattern", self.rank_pattern, self.r)
        by_subband = pattern if isinstance(pattern, dict) else {}
        rank = self.r if isinstance(pattern, dict) else pattern
        return self.form_object.ranks(self, rank, {**(self.subband_ranks or {}), **by_subband})

    def alpha_of(self, module_name: str) -> float | None:
        """Return the numerator of the scaling in the module of that name; None stands for that module's R.

        Raises:
            ValueError: a pattern takes too long to match.
        """
        return value_for(module_name, "alpha_pattern", self.alpha_pattern, self.wara_alpha)

    def with_ranks(self, ranks: Mapping[str, Mapping[str, int]], names: Iterable[str]) -> WaRAConfig:
        """Return a config with these ranks and with the scalings of this one. A module without any rank is no target.

        Args:
            ranks: for each module, by its full name, the rank of each subband. A subband that is missing has rank 0.
            names: names of all modules of the model.
        """
        rank_pattern: dict[str, int | dict[str, int]] | Json = {}
        alpha_pattern: dict[str, float] | Json = {}
        chosen = [name for name, of_module in ranks.items() if any(of_module.values())]
        for name in chosen:
            by_subband = {band.name: 0 for band in self.form_object.subbands(self)} | dict(ranks[name])
            rank = self.form_object.total_rank(self, by_subband)
            rank_pattern[exact_pattern(name)] = by_subband
            alpha = self.alpha_of(name)
            if alpha is not None or self.use_rslora:  # else alpha is R, and the scaling 1 at any rank
                before = scaling(alpha, self.form_object.total_rank(self, self.ranks_of(name)), self.use_rslora)
                alpha_pattern[exact_pattern(name)] = before * (math.sqrt(rank) if self.use_rslora else rank)
        tied = self.target_modules_to_tie or set()
        targets = [*chosen, *sorted(tied)]
        config = dataclasses.replace(
            copy.deepcopy(self),
            target_modules=targets,
            # PEFT compares the ends of names, and would also take modules whose names end in a target's.
            exclude_modules=suffix_matches(targets, names),
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            module_shapes=self.module_shapes and {name: self.module_shapes[name] for name in chosen},
        )
        config.modules_to_tie, config.target_modules_to_tie = self.modules_to_tie, self.target_modules_to_tie
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as they are to be saved.

        PEFT and transformers ask a model for an adapter's tensors and write its config next. So fields that a model
        finds out, such as `module_shapes`, have the values of the model that was asked last. PEFT sorts the keys that
        it writes, so patterns that overlap are rewritten to mean the same in any order.
        """
        config = config_to_write(self)
        names = list(config.module_shapes) if config.module_shapes else None
        fields = dataclasses.asdict(config)
        for name in ("rank_pattern", "alpha_pattern"):
            fields[name] = in_any_order(name, fields[name], names)
        return fields

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and say in the model card that loading needs `import wara_peft`."""
        super().save_pretrained(save_directory, **kwargs)
        add_loading_section(save_directory, self.task_type)

    def __repr__(self) -> str:
        fields = ", ".join(f"{item.name}={getattr(self, item.name)!r}" for item in dataclasses.fields(self))
        return f"{type(self).__name__}(R={self.total_rank}, {fields})"


def scaling(alpha: float | None, rank: int, use_rslora: bool) -> float:
    """Compute scaling in ΔW = scaling · B̂ Â: alpha / R, or alpha / √R with `use_rslora`. An alpha of None means R."""
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if use_rslora else rank)
