"""`form="grid"` over latents: diffusers' UNets and transformers, against dense operators that PyWavelets makes."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tests.references import descend, grid_result, module_shapes
from wara_peft import WaRAConfig
from wara_peft.forms.observed_grids import SeenGrids
from wara_peft.layers.base import WaRALayer

ATTENTION = r"to_[qkv]|to_out\.0|net\.0\.proj|net\.2"
TEXT = 5
"""Text tokens of all prompts."""


def dit() -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    return DiTTransformer2DModel(in_channels=2, num_embeds_ada_norm=3, norm_num_groups=1, **sizes)


def unet() -> nn.Module:
    """Text meets the latents at two resolutions."""
    return UNet2DConditionModel(
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def class_unet() -> nn.Module:
    """Attention over feature maps in its second resolution alone, and classes in place of text."""
    return UNet2DModel(
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=2,
        num_class_embeds=3,
    )


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=2,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=6,
        out_channels=2,
        pos_embed_max_size=8,
    )


def flux() -> nn.Module:
    """A block with two streams, and one with a single stream of text and image."""
    return FluxTransformer2DModel(
        in_channels=2,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=6,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
    )


def noise(rows: int, columns: int) -> Tensor:
    return torch.randn(2, 2, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def conditions(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def positions(rows: int, columns: int) -> Tensor:
    """Flux's: nothing, then the row and the column of each patch."""
    ids = torch.zeros(rows, columns, 3, dtype=torch.float64)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)
    return ids.view(-1, 3)


STEP, CLASSES = torch.tensor([3, 3]), torch.tensor([0, 2])
Call = Callable[[nn.Module, Tensor], Tensor]


def call_flux(model: nn.Module, latents: Tensor) -> Tensor:
    ids = positions(*latents.shape[2:])
    packed = latents.flatten(2).mT
    text = conditions(TEXT, 6)
    return model(packed, text, conditions(6), STEP.double(), img_ids=ids, txt_ids=ids.new_zeros(TEXT, 3)).sample


CALLS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "DiT": (dit, lambda model, x: model(x, timestep=STEP, class_labels=CLASSES).sample),
    "UNet": (unet, lambda model, x: model(x, STEP, conditions(TEXT, 6)).sample),
    "UNet of classes": (class_unet, lambda model, x: model(x, STEP, class_labels=CLASSES).sample),
    "SD3": (sd3, lambda model, x: model(x, conditions(TEXT, 6), conditions(6), STEP).sample),
    "Flux": (flux, call_flux),
}
# latents of two sizes, and for each the layout of a layer's tokens by their number
SIZES: dict[str, list[tuple[tuple[int, int], dict[int, tuple[int, int, int]]]]] = {
    # diffusers' DiT puts out squares alone
    "DiT": [((8, 8), {16: (0, 4, 4)}), ((6, 6), {9: (0, 3, 3)})],
    # 4 x 9 and 6 x 6 have as many places
    "UNet": [((4, 9), {36: (0, 4, 9), 10: (0, 2, 5)}), ((6, 6), {36: (0, 6, 6), 9: (0, 3, 3)})],
    "UNet of classes": [((8, 12), {24: (0, 4, 6)}), ((4, 8), {8: (0, 2, 4)})],
    "SD3": [((8, 12), {24: (0, 4, 6)}), ((6, 4), {6: (0, 3, 2)})],
    "Flux": [((4, 9), {36: (0, 4, 9), 41: (TEXT, 4, 9)}), ((6, 6), {36: (0, 6, 6), 41: (TEXT, 6, 6)})],
}
TARGETS = {"Flux": rf".*({ATTENTION}|x_embedder|proj_mlp|proj_out)"}


def make(name: str) -> tuple[nn.Module, Callable[[nn.Module, int], Tensor]]:
    """A base model in float64, and a call with latents of one of the sizes."""
    torch.manual_seed(0)
    build, call = CALLS[name]
    model = build().double().eval()
    for parameter in model.parameters():  # of which some start at zero
        nn.init.normal_(parameter, std=0.3)
    return model, lambda model, size: call(model, noise(*SIZES[name][size][0]))


def grid_config(name: str, **fields: Any) -> WaRAConfig:
    targets = TARGETS.get(name, rf".*({ATTENTION})")
    excluded = r".*(attn2\.to_[kv]|ff_context.*)" if name in ("UNet", "SD3", "Flux") else None
    chosen = {"target_modules": targets, "exclude_modules": excluded, "init_weights": False, "r": 1, **fields}
    return WaRAConfig(form="grid", wara_alpha=16, **chosen)


def adapted(name: str, **fields: Any) -> tuple[PeftModel, Callable[[nn.Module, int], Tensor]]:
    model, call = make(name)
    torch.manual_seed(1)
    return get_peft_model(model, grid_config(name, **fields)).double().eval(), call


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:levels=1 is more than is useful for wavelet='db2'")
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("name", CALLS)
def test_every_layer_at_every_resolution(name, wavelet):
    """Twice there and back, so that what is left of one size cannot serve another."""
    model, call = adapted(name, wavelet=wavelet)
    calls: list[tuple[WaRALayer, Tensor, Tensor]] = []
    for layer in model.modules():
        if isinstance(layer, WaRALayer):
            layer.register_forward_hook(lambda layer, args, output: calls.append((layer, args[0], output)))
    for size in (0, 1, 0, 1):
        calls.clear()
        with torch.no_grad():
            call(model, size)
        layouts = SIZES[name][size][1]
        assert {x.shape[1] for _, x, _ in calls} == layouts.keys()
        assert {layer for layer, _, _ in calls} == {m for m in model.modules() if isinstance(m, WaRALayer)}
        for layer, x, output in calls:
            expected = grid_result(layer, x, layouts[x.shape[1]], wavelet)
            torch.testing.assert_close(output, expected, atol=1e-11, rtol=1e-11)
            assert not torch.allclose(output, layer.base_layer(x), atol=1e-3)


@pytest.mark.parametrize("name", ["DiT", "UNet", "UNet of classes", "SD3"])
def test_tokens_lie_row_by_row(name):
    """What changes most in the first layer when one place of the latents changes is that place's token.

    Or, after convolutions, a neighbour's.
    """
    reach = 1 if "UNet" in name else 0
    model, _ = make(name)
    size, layouts = SIZES[name][0]
    tokens, (_, rows, columns) = next(iter(layouts.items()))
    height, width = size[0] // rows, size[1] // columns
    inputs: list[Tensor] = []
    layer = next(m for n, m in model.named_modules() if n.endswith("to_q"))
    layer.register_forward_hook(lambda layer, args, output: inputs.append(args[0]))
    for row, column in ((0, columns - 1), (rows - 1, 0), (1, 2)):
        inputs.clear()
        latents = noise(*size)
        changed = latents.clone()
        changed[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width] += 10
        with torch.no_grad():
            CALLS[name][1](model, latents)
            CALLS[name][1](model, changed)
        difference = (inputs[1] - inputs[0]).abs().sum((0, 2))
        assert difference.shape == (tokens,)
        found_row, found_column = divmod(int(difference.argmax()), columns)
        assert abs(found_row - row) <= reach
        assert abs(found_column - column) <= reach


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["separate", "shared"])
@pytest.mark.parametrize("name", CALLS)
def test_training_saving_and_loading(name, pairs, tmp_path):
    model, call = make(name)
    with torch.no_grad():
        target = call(model, 0)
    model = get_peft_model(model, grid_config(name, grid_pairs=pairs)).double().train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("wara_" in n for n in trained)

    def loss() -> Tensor:
        torch.manual_seed(0)  # a DiT in training leaves labels out at random
        return (call(model, 0) - target).square().mean()

    descend(loss, trained.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(name)[0], tmp_path, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        for size in (1, 0):
            torch.testing.assert_close(call(again, size), call(model, size), atol=1e-9, rtol=1e-9)


def test_diffusers_own_adapters():
    model, call = make("UNet")
    expected, _ = adapted("UNet")
    torch.manual_seed(1)
    model.add_adapter(grid_config("UNet"))
    model.double()
    with torch.no_grad():
        assert torch.equal(call(model, 1), call(expected, 1))


@pytest.mark.parametrize("name", ["DiT", "UNet of classes"])
def test_recomputed_blocks_keep_their_grids(name):
    """Two sizes before one backward: each block runs again when the model has gone on to another size."""
    gradients = []
    for checkpointing in (False, True):
        model, call = adapted(name)
        model.train()
        if checkpointing:
            model.base_model.model.enable_gradient_checkpointing()
        (call(model, 0).square().sum() + call(model, 1).square().sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


@pytest.mark.slow
def test_flux_compiles_with_its_grid_named():
    """Positions are values, which a whole graph cannot look at."""
    model, call = adapted("Flux", grid_size=(4, 9))
    other, call_other = adapted("Flux")
    with torch.no_grad():
        expected = call(model, 0)
        model.base_model.model.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(call(model, 0), expected)
        other.base_model.model.compile(fullgraph=True, backend="eager")
        with pytest.raises(torch._dynamo.exc.Unsupported):
            call_other(other, 0)


def test_positions_are_seen_for_a_second_adapter_whose_grid_is_not_named():
    model, call = adapted("Flux", grid_size=(4, 9))
    model.add_adapter("second", grid_config("Flux"))
    model.double()
    call(model, 0)
    layer = model.base_model.model.transformer_blocks[0].attn.to_q
    assert layer.token_mixing["second"].grid.split(36) == layer.token_mixing["default"].grid.split(36) == (0, 4, 9)


class TestWhatSeesTheImage:
    @pytest.mark.parametrize(
        ("name", "targets", "message"),
        [
            (
                "UNet",
                ["to_q", "to_k", "to_v"],
                r"module 'down_blocks.0.*attn2.to_k', .* which sees only text or conditions.*form='subband'.*"
                r"`exclude_modules=\['attn2.to_k', 'attn2.to_v'\]`",
            ),
            (
                "SD3",
                rf".*({ATTENTION}|add_[qkv]_proj|to_add_out|context_embedder)",
                r"\['add_k_proj', 'add_q_proj', 'add_v_proj', 'context_embedder', 'ff_context.net.0.proj', "
                r"'ff_context.net.2', 'to_add_out'\]",
            ),
            ("Flux", ["add_k_proj", "to_k"], r"'transformer_blocks.0.attn.add_k_proj'.*\['add_k_proj'\]"),
            ("DiT", ["norm1.linear"], r"'transformer_blocks.0.norm1.linear'.*Name others"),
        ],
    )
    def test_text_is_refused_before_anything_changes(self, name, targets, message):
        model, _ = make(name)
        before = {name: type(module) for name, module in model.named_modules()}
        for explicit in ({}, {"grid_size": (4, 4), "num_prefix_tokens": 0}):
            with pytest.raises(ValueError, match=message):
                get_peft_model(model, WaRAConfig(form="grid", target_modules=targets, **explicit))
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_what_it_names_is_enough(self):
        model, _ = make("SD3")
        excluded = [
            "add_k_proj",
            "add_q_proj",
            "add_v_proj",
            "to_add_out",
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ]
        targets = rf".*({ATTENTION}|add_[qkv]_proj|to_add_out)"
        model = get_peft_model(model, WaRAConfig(form="grid", target_modules=targets, exclude_modules=excluded))
        names = [n for n, m in model.named_modules() if isinstance(m, WaRALayer)]
        assert len(names) == 2 * 6
        assert not any("context" in name or "add" in name for name in names)

    def test_a_second_adapter_takes_the_text(self):
        model, call = adapted("UNet")
        text = WaRAConfig(target_modules=["attn2.to_k", "attn2.to_v"], init_weights=False, wara_alpha=64)
        model.add_adapter("text", text)
        model.double()
        with torch.no_grad():
            alone = call(model, 0)
            model.base_model.set_adapter(["default", "text"])
            together = call(model, 0)
        assert not torch.allclose(together, alone, atol=1e-3)
        call(model.train(), 0).square().sum().backward()
        trained = {n.split(".wara_")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None}
        assert {"to_q", "to_k", "to_v"} <= trained

    def test_a_part_of_a_watched_model(self):
        """An adapter on a block, then one on the model around it: both know what the block's convolutions tell."""
        model, call = make("UNet of classes")
        block = get_peft_model(model.mid_block, grid_config("UNet of classes")).base_model.model
        model.mid_block = block
        whole = get_peft_model(model, grid_config("UNet of classes")).double()
        grids = {
            grid.grid.seen for m in whole.modules() if isinstance(m, WaRALayer) for grid in m.token_mixing.values()
        }
        assert len(grids) == 1
        with torch.no_grad():
            assert call(whole, 0).shape == (2, 2, 8, 12)

    @pytest.mark.parametrize("name", CALLS)
    def test_one_list_leaves_out_all_that_is_refused(self, name):
        """Named one by one, all linear layers that see no image are refused at once; without these it trains."""
        model, call = make(name)
        targets = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
        before = {n: type(module) for n, module in model.named_modules()}
        with pytest.raises(ValueError, match="sees only text or conditions") as error:
            get_peft_model(model, WaRAConfig(form="grid", target_modules=targets))
        assert {n: type(module) for n, module in model.named_modules()} == before
        excluded = ast.literal_eval(re.search(r"`exclude_modules=(\[.*?\])`", str(error.value))[1])
        config = WaRAConfig(form="grid", target_modules=targets, exclude_modules=excluded, init_weights=False)
        adapted = get_peft_model(model, config).double().train()
        call(adapted, 0).square().sum().backward()
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * len(module_shapes(adapted))
        assert all(p.grad.isfinite().all() for p in trained.values())

        # "all-linear" leaves out the same.
        other, call = make(name)
        with pytest.warns(UserWarning, match="all-linear") as caught:
            other = get_peft_model(other, WaRAConfig(form="grid", target_modules="all-linear")).double().train()
        assert len([warning for warning in caught if "all-linear" in str(warning.message)]) == 1
        assert f"`exclude_modules={excluded}`" in str(caught[0].message)
        assert module_shapes(other) == module_shapes(adapted)
        call(other, 1).square().sum().backward()

    def test_a_grid_that_fits_no_resolution(self):
        model, call = adapted("UNet", grid_size=(4, 9))
        message = (
            r"grid_size=\(4, 9\) is not what module 'down_blocks.1.*to_q' sees: the model's convolutions make "
            r"\(2, 5\) patches of its 10 tokens. Leave grid_size out"
        )
        with pytest.raises(ValueError, match=message):
            call(model, 0)

    def test_a_transformer_of_patches_without_positions(self):
        """Positions that are no whole grid tell nothing; fields of the config do."""

        def call(model: nn.Module) -> Tensor:
            latents, text = noise(4, 9).flatten(2).mT, conditions(TEXT, 6)
            ids = torch.cat((positions(4, 6), positions(3, 4)))  # of two images
            return model(latents, text, conditions(6), STEP.double(), img_ids=ids, txt_ids=ids[:TEXT]).sample

        model, _ = adapted("Flux")
        with pytest.raises(ValueError, match=r"The 36 tokens in module 'x_embedder' fit no grid: expected a grid of"):
            call(model)
        explicit, on_grid = adapted("Flux", grid_size=(4, 9))
        assert call(explicit).shape == (2, 36, 2)
        with torch.no_grad():
            torch.testing.assert_close(on_grid(explicit, 0), on_grid(model, 0))

    def test_levels_beyond_the_grid_of_a_transformer_warn(self):
        with pytest.warns(UserWarning, match=r"levels=3.*\(row axis of length 4: at most 2\)"):
            adapted("DiT", levels=3)


class TestHooks:
    @staticmethod
    def seen(model: nn.Module) -> set[SeenGrids]:
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        return {hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), SeenGrids)}

    def test_one_for_all_adapters_and_none_after_unloading(self):
        model, _ = adapted("UNet of classes")
        model.add_adapter("other", grid_config("UNet of classes"))
        (seen,) = self.seen(model)
        layer = next(m for m in model.modules() if isinstance(m, WaRALayer))
        assert all(layer.token_mixing[name].grid.seen is seen for name in ("default", "other"))
        base = model.unload()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())

    def test_a_copy_has_its_own(self):
        model, call = adapted("UNet of classes")
        copied = copy.deepcopy(model)
        with torch.no_grad():
            call(copied, 0)
        (seen,), (of_copy,) = self.seen(model), self.seen(copied)
        assert (4, 6) in {layout[1:] for layout in of_copy.layouts.values()}
        assert not seen.layouts
        with torch.no_grad():
            assert torch.equal(call(copied, 1), call(model, 1))
