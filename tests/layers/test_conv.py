"""WaRA beside convolutions against PyWavelets' ΔW, dense convolutions and PEFT's LoRA."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from tests.references import inverse_transform
from wara_peft import WaRAConfig, save_as_lora, to_lora
from wara_peft.layers.conv import Conv

# layer, input shape: one row a case
CASES = {
    "conv1d": (lambda: nn.Conv1d(6, 10, 3), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(5, 8, 3, padding=1), (2, 5, 7, 7)),
    "conv2d-pointwise": (lambda: nn.Conv2d(6, 4, 1, bias=False), (2, 6, 5, 5)),
    "conv2d-strided-dilated": (lambda: nn.Conv2d(6, 9, (3, 2), stride=2, dilation=2, padding=(2, 1)), (2, 6, 9, 8)),
    "conv2d-circular": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 6, 6)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 6, 6)),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 6, 6)),
    "conv2d-depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 6, 6)),
    "conv2d-one-channel": (lambda: nn.Conv2d(1, 1, 3), (2, 1, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (1, 4, 4, 4, 4)),
    "conv2d-unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 6)),
}
FIELDS = ({"r": 2}, {"r": 1, "wavelet": "db2", "levels": 2, "subband_ranks": {"aa0": 1}}, {"form": "shared"})

pytestmark = pytest.mark.filterwarnings("ignore:levels=", "ignore:PEFT's LoRA computes", "ignore:.*groups > 1")


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(map(str, fields)))
@pytest.mark.parametrize("case", CASES)
def test_equals_a_convolution_with_the_delta_of_pywavelets(case, fields):
    make, shape = CASES[case]
    config = WaRAConfig(init_weights=False, wara_alpha=3, **fields)
    layer = Conv(make().double(), "default", "conv", config).double()
    base = layer.base_layer
    factor_a, factor_b = layer.wara_A["default"], layer.wara_B["default"]

    out, in_, *kernel = base.weight.shape
    expected = np.zeros((out, in_, int(np.prod(kernel))))
    for position in range(expected.shape[2]):
        coefficients = {
            name: (factor_b.subband(name) @ factor_a.subband(name).flatten(2)[..., position]).detach().numpy()
            for name in factor_a.subbands
        }
        expected[..., position] = inverse_transform(coefficients, config.wavelet, (out, in_), config.levels)
    expected = 3 / layer.total_rank("default") * expected.reshape(base.weight.shape)
    np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), expected, atol=1e-12)

    x = torch.randn(shape, dtype=torch.float64)
    dense = copy.deepcopy(base)
    dense.weight.data += torch.from_numpy(expected)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-10, rtol=0)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA")
@pytest.mark.parametrize("case", CASES)
def test_saves_loads_and_exports(case, tmp_path):
    make, shape = CASES[case]
    base = OneLayer(make())
    model = get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["conv"], init_weights=False)).eval()
    x = torch.randn(shape)
    model.save_pretrained(tmp_path / "wara")
    save_as_lora(tmp_path / "lora", model)
    from_directory = to_lora(tmp_path / "wara")[1]
    assert all(torch.equal(value, from_directory[key]) for key, value in to_lora(model)[1].items())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "wara").eval()
    assert torch.equal(loaded(x), model(x))
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    if case in ("conv2d-strided-dilated", "conv2d-circular"):
        lora = lora.merge_and_unload()  # PEFT's unmerged LoRA has neither dilation nor padding mode
    torch.testing.assert_close(lora(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA")
@pytest.mark.parametrize("case", ["conv2d-strided-dilated", "conv2d-circular"])
def test_export_warns_of_what_pefts_lora_leaves_out(case):
    model = get_peft_model(OneLayer(CASES[case][0]()), WaRAConfig(target_modules=["conv"]))
    with pytest.warns(UserWarning, match="'conv'.*merge the exported LoRA"):
        to_lora(model)


def test_a_new_adapter_changes_nothing_and_learns():
    layer = Conv(nn.Conv2d(5, 8, 3), "default", "conv", WaRAConfig())
    x = torch.randn(2, 5, 6, 6)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).square().sum().backward()
    assert layer.wara_B["default"].level1.grad.abs().max() > 0
