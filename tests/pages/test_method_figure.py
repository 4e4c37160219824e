"""The picture of the method draws what the method computes."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pywt
import torch
from matplotlib.image import imread

from wara_peft import WaRAConfig
from wara_peft.model import WaRAModel

SCRIPT = Path(__file__).parents[2] / "docs" / "figures" / "method.py"
drawing = runpy.run_path(str(SCRIPT))
PAIRS, ROWS, COLUMNS, RANK = drawing["pairs"](), drawing["ROWS"], drawing["COLUMNS"], drawing["RANK"]


def drawn_update() -> np.ndarray:
    return sum(pair.b @ pair.a for pair in PAIRS.values())


def test_the_drawn_lora_is_the_inverse_transform_of_the_drawn_subbands() -> None:
    subbands = {name.removesuffix("1"): pair.coefficients_b @ pair.coefficients_a for name, pair in PAIRS.items()}
    np.testing.assert_allclose(drawn_update(), pywt.idwtn(subbands, "haar"), atol=1e-12)
    assert np.linalg.matrix_rank(drawn_update()) == 4 * RANK


def test_the_package_computes_the_drawn_update() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False)).double()
    adapted = WaRAModel(model, WaRAConfig(r=RANK, target_modules=["0"]), "default")
    # The subbands of a level are stacked in the order that the picture has them in.
    layer = adapted.model[0]
    with torch.no_grad():
        stacked_a = np.concatenate([pair.coefficients_a for pair in PAIRS.values()], 0)
        stacked_b = np.concatenate([pair.coefficients_b for pair in PAIRS.values()], 1)
        layer.wara_A["default"].level1.copy_(torch.from_numpy(stacked_a))
        layer.wara_B["default"].level1.copy_(torch.from_numpy(stacked_b))
    update = layer.get_delta_weight("default")
    np.testing.assert_allclose(update.detach().numpy(), drawn_update(), atol=1e-6)


def test_the_kept_picture_is_opaque_and_of_this_shape() -> None:
    kept = imread(SCRIPT.with_suffix(".png"))
    width, height = drawing["figure"]().get_size_inches()
    assert kept.shape[1] / kept.shape[0] == round(width * 150) / round(height * 150)
    assert kept.shape[2] == 3 or kept[..., 3].min() == 1
    assert (kept[0, :, :3] == 1).all()
