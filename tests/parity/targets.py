"""Rows about the kinds of layers that can be adapted."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tests.models import TOKENS, WORDS, Attention, mamba, mlp
from tests.models import quantized as quantized_layer
from tests.references import Conv1DModel

from .models import X, adapted, check_adapts, close, layers_of, output, train
from .table import WORKS, Area, Method

AREA = Area("Layers")
row = AREA.row


@row("`nn.Linear`")
def linear(method: Method) -> str | None:
    check_adapts(method, mlp(), X, ["up", "down"])


@row("transformers' `Conv1D`")
def conv1d_of_transformers(method: Method) -> str | None:
    check_adapts(method, Conv1DModel(), torch.randn(4, 9), ["proj"])


@row("`nn.Embedding`", inside="refused: LoRA of embeddings has bare parameters")
def embedding(method: Method) -> str | None:
    check_adapts(method, nn.Sequential(nn.Embedding(40, 12), mlp()), TOKENS, ["0"])


def convolution(method: Method, layer: type[nn.Module], shape: tuple[int, ...], **fields: Any) -> str | None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    base = nn.Sequential(layer(4, 8, 3, **fields), nn.Flatten(), nn.LazyLinear(3))
    base(x)
    before = output(base, x)
    model = adapted(method, base, init=True, target_modules=["0"], r=4)
    assert close(output(model, x), before)
    train(model, x)
    after = output(model, x)
    merged = output(model.merge_and_unload(), x)
    return None if close(merged, after, 1e-4) else "unmerged it computes something else than merged"


for name, layer, shape in (
    ("Conv1d", nn.Conv1d, (2, 4, 6)),
    ("Conv2d", nn.Conv2d, (2, 4, 6, 6)),
    ("Conv3d", nn.Conv3d, (2, 4, 4, 4, 4)),
):
    row(f"`nn.{name}`")(partial(convolution, layer=layer, shape=shape))
row(
    "a convolution with groups",
    lora="refused: Merging is not supported for _ConvNd layers with groups > 1",
    inside="refused: LoRA shares its rank out over the groups of a convolution",
)(partial(convolution, layer=nn.Conv2d, shape=(2, 4, 6, 6), groups=2))
row("a convolution with a dilation", lora="refused: The size of tensor a (2) must match the size of tensor b (4)")(
    partial(convolution, layer=nn.Conv2d, shape=(2, 4, 6, 6), dilation=2)
)
row('a convolution with `padding_mode="circular"`', lora="differs: unmerged it computes something else than merged")(
    partial(convolution, layer=nn.Conv2d, shape=(2, 4, 6, 6), padding=1, padding_mode="circular")
)


@row(
    "an `nn.LSTM`",
    lora="refused: Target module LSTM(12, 8) is not supported",
    wara="refused: Target module rnn (LSTM) is not supported",
)
def lstm(method: Method) -> str | None:
    adapted(method, nn.ModuleDict({"rnn": nn.LSTM(12, 8)}), target_modules=["rnn"])


def attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention()


@row("`nn.MultiheadAttention` as a whole")
def multihead_attention(method: Method) -> str | None:
    check_adapts(method, attention(), X[None], ["attention"])


@row("its output projection, whose update is to be added once", lora="differs: it is added twice")
def update_of_out_proj(method: Method) -> str | None:
    model, expected = adapted(method, attention(), target_modules=["attention"]), attention()
    names = {"in_proj_weight": "in_proj_weight", "out_proj": "out_proj.weight"}
    for name, layer in layers_of(model, method).items():
        weight = names.get(name.rpartition(".")[2], "in_proj_weight")
        expected.attention.get_parameter(weight).data += layer.get_delta_weight("default").data
    x = X[None].clone().requires_grad_()
    return None if close(model(x), expected(x), 1e-4) else "it is added twice"


@row(
    "`out_proj` of `nn.MultiheadAttention` alone",
    lora="differs: it has no effect",
    wara="refused: An adapter would have no effect in target module 'attention.out_proj'",
    instead="the attention as a whole, or `exclude_modules`",
)
def out_proj(method: Method) -> str | None:
    model = adapted(method, attention(), target_modules=["out_proj"])
    return "it has no effect" if close(output(model, X[None]), output(attention(), X[None])) else None


@row("linear layers of `nn.TransformerEncoder` in eval mode", lora="differs: they have no effect")
def encoder_layer(method: Method) -> str | None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 1))
    before = output(base, X[None])
    model = adapted(method, base, target_modules=["linear1", "linear2"])
    return "they have no effect" if close(output(model, X[None]), before) else None


@row("`in_proj` and `x_proj` of Mamba")
def in_proj_of_mamba(method: Method) -> str | None:
    check_adapts(method, mamba(), WORDS, ["in_proj", "x_proj"])


def of_mamba(method: Method, name: str) -> str | None:
    model = adapted(method, mamba(), target_modules=[name])
    return "it has no effect" if close(output(model, WORDS), output(mamba(), WORDS)) else None


for name in ("out_proj", "conv1d"):
    row(
        f"`{name}` of Mamba, whose kernel reads its weight",
        lora=f"refused: Module '{name}' is incompatible with Mamba-based models",
        wara=f"refused: An adapter would have no effect in target module 'backbone.layers.0.mixer.{name}'",
        instead="`in_proj`, `x_proj`",
    )(partial(of_mamba, name=name))
row(
    "`dt_proj` of Mamba, which is never called",
    lora="differs: it has no effect",
    wara="refused: An adapter would have no effect in target module 'backbone.layers.0.mixer.dt_proj'",
    instead="`in_proj`, `x_proj`",
)(partial(of_mamba, name="dt_proj"))


def quantized(method: Method, bits: int) -> str | None:
    torch.manual_seed(0)
    base = nn.Sequential(quantized_layer("nf4" if bits == 4 else "int8"), nn.Linear(64, 3))
    x = torch.randn(4, 64)
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = bits == 4, bits == 8
    output(base, x)
    model = adapted(method, base, init=True, target_modules=["0"])
    train(model, x)


for bits in (4, 8):
    row(f"bitsandbytes, {bits} bits", needs="bitsandbytes", dtype=torch.float32)(partial(quantized, bits=bits))
AREA.shown_in(
    "merging into and out of bitsandbytes layers",
    "tests/base_layers/test_quantization.py",
    inside=WORKS,
    inside_test="tests/lora/test_reparametrize.py",
)
