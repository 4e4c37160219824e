"""`form="grid"` in models that segment: a grid a stage, reduced keys and values, decoders without prefix tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    DPTConfig,
    DPTForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)

from tests.references import descend, grid_result
from wara_peft import WaRAConfig
from wara_peft.layers.base import WaRALayer

SIZES = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 12, "patch_size": 4}
COMMON = {"num_labels": 3, "use_auxiliary_head": False, **SIZES}


def segformer() -> nn.Module:
    """Two stages, the first with keys and values of half the rows and columns."""
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[4, 8],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=3,
    )
    return SegformerForSemanticSegmentation(config)


def dpt() -> nn.Module:
    necks = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [4] * 4, "fusion_hidden_size": 4}
    return DPTForSemanticSegmentation(DPTConfig(image_size=16, is_hybrid=False, **necks, **COMMON))


def beit() -> nn.Module:
    necks = {"out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "use_relative_position_bias": True}
    return BeitForSemanticSegmentation(BeitConfig(image_size=16, vocab_size=20, **necks, **COMMON))


class LinearDecoder(nn.Module):
    """A ViT whose patches are classified each by itself, as segmentation is probed."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ViTModel(ViTConfig(image_size=16, **SIZES), add_pooling_layer=False)
        self.decoder = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.backbone(pixel_values=pixel_values, interpolate_pos_encoding=True).last_hidden_state
        return self.decoder(tokens[:, 1:])


Layouts = dict[int, tuple[int, int, int]]
# what makes the model, and images of two sizes with the layout of a layer's tokens by their number
MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[tuple[int, int], Layouts]]]] = {
    # 37 pixels are 10 strides of 4 begun, and those 5 of 2
    "SegFormer": (
        segformer,
        [
            ((24, 37), {60: (0, 6, 10), 15: (0, 3, 5)}),
            ((40, 24), {60: (0, 10, 6), 15: (0, 5, 3)}),
        ],
    ),
    # transformers' DPT reassembles squares alone
    "DPT": (dpt, [((16, 16), {17: (1, 4, 4), 16: (0, 4, 4)}), ((24, 24), {37: (1, 6, 6), 36: (0, 6, 6)})]),
    "BEiT": (beit, [((16, 24), {25: (1, 4, 6)}), ((24, 16), {25: (1, 6, 4)})]),
    # 3 x 5 patches and CLS are as many as 4 x 4 patches
    "ViT with a linear decoder": (
        LinearDecoder,
        [((16, 16), {17: (1, 4, 4), 16: (0, 4, 4)}), ((12, 20), {16: (1, 3, 5), 15: (0, 3, 5)})],
    ),
}


def base(name: str) -> nn.Module:
    """The model in float64, with weights at which its output is of the order of one."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def adapted(name: str, **fields: object) -> PeftModel:
    """With adapters on every linear layer."""
    model = base(name)
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = {"target_modules": targets, "r": 1, "wara_alpha": 16, "init_weights": False, **fields}
    return get_peft_model(model, WaRAConfig(form="grid", **config)).double().eval()


def image(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scores(model: nn.Module, size: tuple[int, int]) -> Tensor:
    output = model(pixel_values=image(size))
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:levels=1 is more than is useful for wavelet='db2'")
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_at_every_size(name, wavelet):
    model = adapted(name, wavelet=wavelet)
    calls: list[tuple[WaRALayer, Tensor, Tensor]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, WaRALayer)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, output: calls.append((layer, args[0], output)))
    for size, layouts in MODELS[name][1] * 2:
        calls.clear()
        with torch.no_grad():
            scores(model, size)
        assert {x.shape[1] for _, x, _ in calls} == layouts.keys()
        assert len({layer for layer, _, _ in calls}) == len(layers)
        for layer, x, output in calls:
            expected = grid_result(layer, x, layouts[x.shape[1]], wavelet)
            torch.testing.assert_close(output, expected, atol=1e-11, rtol=1e-11)


def test_which_layers_of_segformer_see_the_reduced_grid():
    model = adapted("SegFormer")
    tokens: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, WaRALayer):
            layer.register_forward_hook(lambda layer, args, output, name=name: tokens.update({name: args[0].shape[1]}))
    with torch.no_grad():
        scores(model, (24, 37))
    of_first = {name.split(".")[-1]: count for name, count in tokens.items() if "stages.0" in name}
    assert of_first == {"q_proj": 60, "k_proj": 15, "v_proj": 15, "o_proj": 60, "fc1": 60, "fc2": 60}
    assert {count for name, count in tokens.items() if "stages.1" in name} == {15}
    decoder = [count for name, count in tokens.items() if "decode_head" in name]
    assert decoder == [60, 15]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_lie_row_by_row(name):
    """What changes most in the first layer when a patch of the image changes is its token, or a neighbour's."""
    model = base(name)
    size, layouts = MODELS[name][1][-1]
    tokens, (prefix, rows, columns) = next(iter(layouts.items()))
    inputs: list[Tensor] = []
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda layer, args, output: inputs.append(args[0]))
    for row, column in ((0, columns - 1), (rows - 1, 0), (1, 2)):
        inputs.clear()
        changed = image(size)
        changed[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 10
        with torch.no_grad():
            scores(model, size)
            model(pixel_values=changed)
        difference = (inputs[1] - inputs[0]).abs().sum((0, 2))
        assert difference.shape == (tokens,)
        found_row, found_column = divmod(int(difference.argmax()) - prefix, columns)
        reach = 1 if name == "SegFormer" else 0  # whose patches overlap
        assert abs(found_row - row) <= reach
        assert abs(found_column - column) <= reach


@pytest.mark.parametrize("name", MODELS)
def test_training_saving_and_loading(name, tmp_path):
    sizes = [size for size, _ in MODELS[name][1]]
    model = adapted(name, init_weights=True)
    with torch.no_grad():
        target = scores(model, sizes[0]).roll(1, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    descend(lambda: (scores(model, sizes[0]) - target).square().mean(), trained)
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all(name == "BEiT" and "layers.3" in n for n in idle)  # whose output that model does not use
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(name), tmp_path, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        for size in sizes:
            torch.testing.assert_close(scores(again, size), scores(model, size), atol=1e-6, rtol=1e-6)
