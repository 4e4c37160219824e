"""WaRA beside convolutions against PyWavelets' ΔW, dense convolutions and PEFT's LoRA."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.cases import each_case
from tests.references import inverse_transform
from wara_peft import WaRAConfig, to_lora
from wara_peft.layers.conv import Conv

FIELDS = ({"r": 2}, {"r": 1, "wavelet": "db2", "levels": 2, "subband_ranks": {"aa0": 1}}, {"form": "shared"})


@pytest.mark.filterwarnings("ignore:levels=")
@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(map(str, fields)))
@each_case(where=lambda case: case.name.startswith(("Conv1d", "Conv2d", "Conv3d")) and case.form == "subband")
def test_equals_a_convolution_with_the_delta_of_pywavelets(case, fields):
    config = WaRAConfig(init_weights=False, wara_alpha=3, **fields)
    layer = Conv(case.base().layer.double(), "default", "conv", config).double()
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

    x = case.inputs.double()
    dense = copy.deepcopy(base)
    dense.weight.data += torch.from_numpy(expected)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-10, rtol=0)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-10, rtol=0)


@each_case(where=lambda case: case.kinds == ("Conv2d",) and case.lora == ("merged",))
def test_export_warns_of_what_pefts_lora_leaves_out(case):
    with pytest.warns(UserWarning, match="PEFT loads all"), pytest.warns(UserWarning, match="merge the exported LoRA"):
        to_lora(case.adapted())
