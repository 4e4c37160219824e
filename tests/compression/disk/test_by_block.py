"""`compress_by_block` makes what `calibrate`, `compress` and `save_compressed` make, with one block in memory."""

from __future__ import annotations

import json
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.compression.models import batches, bert, llama, vit
from tests.forked_python import run_python
from wara_peft.calibration.input_moments import Moments
from wara_peft.compression import (
    SVD,
    Activation,
    Dictionary,
    Fisher,
    OneShotDictionary,
    calibrate,
    compress,
    compress_by_block,
    load_compressed,
    save_compressed,
)
from wara_peft.compression.disk.block_calls import BlockModel, Call
from wara_peft.compression.disk.blockwise_model import BlockwiseModel, block_list
from wara_peft.compression.solvers.solve import factorize_weight
from wara_peft.compression.statistics.collect import bytes_needed
from wara_peft.compression.statistics.layer_statistics import LayerStatistics, probe_of

QUIET = {"show_progress_bar": False}


def tied() -> LlamaForCausalLM:
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def data_of(model: Any) -> list[dict[str, Tensor]]:
    """Batches with masks, of which the last has fewer and shorter samples."""
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": torch.randn(count, 1, 8, 8)} for count in (4, 4, 2)]
    whole = batches(3, labelled=False)
    # As many samples as positions: the shape of the mask does not tell which is which.
    square = {name: tensor[:, :4] for name, tensor in whole[0].items()}
    return [*whole, square, {name: tensor[1:3, :5] for name, tensor in whole[0].items()}]


def saved(make: Any, path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = make().to(dtype)
    model.save_pretrained(path, max_shard_size="5KB")
    return type(model).from_pretrained(path)


def assert_same(path: Path, expected: nn.Module, folder: Path) -> None:
    save_compressed(expected, folder)
    # The configs, marks included, and the tensors are the same; only their shards differ.
    assert json.loads((path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    found, other = (
        {key: value for file in each.glob("*.safetensors") for key, value in load_file(file).items()}
        for each in (path, folder)
    )
    assert found.keys() == other.keys()
    for key, value in other.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)
    loaded = load_compressed(path)
    assert loaded.compression_report == expected.compression_report


UNIFORM, GREEDY = Activation(0.6, allocation="uniform"), Activation(0.6)
IN_BLOCKS = Activation(0.6, target_modules=r".*layers?\.\d+\..*")


@pytest.mark.parametrize(
    ("make", "method", "sequential"),
    [
        (llama, UNIFORM, False),
        (llama, GREEDY, False),
        (llama, IN_BLOCKS, True),
        (llama, Activation(0.6, allocation="cost", compensate_bias=False), False),
        (llama, OneShotDictionary(0.7, allocation="uniform"), False),
        (llama, Dictionary("6KB", iterations=2), False),
        (tied, UNIFORM, False),
        (bert, GREEDY, False),
        (bert, IN_BLOCKS, True),
        (vit, GREEDY, False),
        (vit, IN_BLOCKS, True),
    ],
)
def test_as_all_at_once(make: Any, method: Any, sequential: bool, tmp_path: Path) -> None:
    model = saved(make, tmp_path / "base")
    data = data_of(model)
    statistics = calibrate(model, data, target_modules=method.target_modules, **QUIET)
    report = compress(model, method, statistics, sequential=data if sequential else None, **QUIET)
    assert {layer.rank for layer in report.layers} != {None}
    # The least memory that the widest layer allows, so that a block runs several times.
    widest = max(
        bytes_needed(saved(make, tmp_path / "b").get_submodule(layer.name), ["inputs"]) for layer in report.layers
    )
    out = tmp_path / "out"
    found = compress_by_block(tmp_path / "base", out, method, data, sequential=sequential, max_bytes=widest, **QUIET)
    assert found == report
    assert_same(out, model, tmp_path / "expected")
    assert not (tmp_path / "out.unfinished").exists()
    assert not list(tmp_path.glob(".out*"))


def test_without_statistics_and_with_given_ranks(tmp_path: Path) -> None:
    model = saved(llama, tmp_path / "base")
    report = compress(model, SVD(0.6), **QUIET)
    assert compress_by_block(tmp_path / "base", tmp_path / "svd", SVD(0.6), **QUIET) == report
    assert_same(tmp_path / "svd", model, tmp_path / "expected")

    ranks = {"model.layers.1.mlp.up_proj": 3}
    model, data = saved(llama, tmp_path / "base"), batches(2, labelled=False)
    report = compress(model, Activation(ranks), calibrate(model, data, **QUIET), **QUIET)
    # An iterator gives its batches once.
    assert compress_by_block(tmp_path / "base", tmp_path / "given", Activation(ranks), iter(data), **QUIET) == report
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "given")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


def test_16_bits_and_positional_batches(tmp_path: Path) -> None:
    model = saved(llama, tmp_path / "base", torch.bfloat16)
    data = [torch.randint(3, 40, (4, 8)) for _ in range(3)]
    report = compress(model, Activation(0.6), calibrate(model, data, **QUIET), **QUIET)
    assert compress_by_block(tmp_path / "base", tmp_path / "out", Activation(0.6), data, **QUIET) == report
    assert_same(tmp_path / "out", model, tmp_path / "expected")


def test_each_block_is_read_once_and_no_other_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(llama, tmp_path / "base")
    data = batches(2, labelled=False)
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    read, runs = [], []
    load, forward = BlockwiseModel.load, BlockModel.forward

    def noted(self: BlockwiseModel, number: int) -> nn.Module:
        assert not alive
        assert all(tensor.is_meta for tensor in self.blocks.parameters())
        block = load(self, number)
        alive.add(block)
        read.append(number)
        return block

    def counted(self: BlockModel, *args: Any, **kwargs: Any) -> None:
        runs.append(self.block.self_attn.layer_idx)
        forward(self, *args, **kwargs)

    monkeypatch.setattr(BlockwiseModel, "load", noted)
    monkeypatch.setattr(BlockModel, "forward", counted)
    method = Activation(0.6, allocation="uniform")
    compress_by_block(tmp_path / "base", tmp_path / "out", method, data, **QUIET)
    # The first block is also read for the form of its output, and each block also runs once to see which layers share
    # their input.
    assert read == [0, 0, 1]
    assert runs == [0] * (1 + len(data)) + [1] * (1 + len(data))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import wara_peft.compression.disk.blockwise_run as run
from tests.compression.models import batches
from wara_peft.compression import Activation, compress_by_block

folder, last = Path(sys.argv[1]), sys.argv[2]
end = run.Run._end

def killed(self, stage, number):
    if f"{stage}-{number}" == last:
        os.kill(os.getpid(), signal.SIGKILL)
    end(self, stage, number)

run.Run._end = killed
torch.manual_seed(1)
data = batches(3, labelled=False)
compress_by_block(folder / "base", folder / "out", Activation(0.6), data, show_progress_bar=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("last", ["gains-0", "factors-0", "factors-1"])
def test_killed_and_resumed(last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(llama, tmp_path / "base")
    killed = run_python("-c", KILLED, tmp_path, last)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    work = tmp_path / "out.unfinished"
    done = [file.name for file in work.iterdir()]
    assert ("gains-00000.json" in done) and ("block-00000.safetensors" in done) == last.startswith("factors")
    torch.manual_seed(1)
    data = batches(3, labelled=False)
    with pytest.raises(ValueError, match=r"other arguments: 'method'\. Call with those, or remove"):
        compress_by_block(tmp_path / "base", tmp_path / "out", Activation(0.5), data, **QUIET)
    with pytest.raises(ValueError, match="other arguments: 'batches'"):
        compress_by_block(tmp_path / "base", tmp_path / "out", Activation(0.6), data[:2], **QUIET)
    read = []
    load = BlockwiseModel.load
    monkeypatch.setattr(BlockwiseModel, "load", lambda self, number: read.append(number) or load(self, number))
    found = compress_by_block(tmp_path / "base", tmp_path / "out", Activation(0.6), data, **QUIET)
    assert read == {"gains-0": [1, 0, 1], "factors-0": [1], "factors-1": []}[last]
    assert found == compress(model, Activation(0.6), calibrate(model, data, **QUIET), **QUIET)
    assert_same(tmp_path / "out", model, tmp_path / "expected")
    assert not work.exists()


def test_interrupted_before_the_blocks(tmp_path: Path) -> None:
    model = saved(llama, tmp_path / "base")
    data = batches(2, labelled=False)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        compress_by_block(tmp_path / "base", tmp_path / "out", Activation(0.6), iter([*data, {"x": data[0]}]), **QUIET)
    assert not (tmp_path / "out").exists()
    found = compress_by_block(tmp_path / "base", tmp_path / "out", Activation(0.6), iter(data), **QUIET)
    assert found == compress(model, Activation(0.6), calibrate(model, data, **QUIET), **QUIET)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that the block makes and that are alive together, also on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.note, out)
        return out

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.peak = max(self.peak, sum(self.sizes.values()))
            weakref.finalize(storage, self.sizes.pop, key, None)


@pytest.fixture(scope="module")
def llama_3_8b() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    assert 8.0e9 < sum(parameter.numel() for parameter in model.parameters()) < 8.1e9
    return model


def test_statistics_of_a_block_of_8b_stay_within_what_is_counted(llama_3_8b: LlamaForCausalLM) -> None:
    block = llama_3_8b.model.layers[0]
    assert sum(parameter.nbytes for parameter in block.parameters()) < 440e6
    widest = bytes_needed(block.mlp.down_proj, ["inputs"])
    assert widest == 20 * 14_336**2 < 4.2e9  # two matrices of float64, and one of float32
    with torch.device("meta"):
        hidden = torch.empty(8, 512, 4096, dtype=torch.bfloat16)
        angles = torch.empty(1, 512, 128, dtype=torch.bfloat16)
    call = Call((None,), {"attention_mask": None, "position_embeddings": (angles, angles)})
    runner = BlockModel(block)

    def peak(names: list[str]) -> tuple[int, int]:
        moments = Moments(runner)
        layers = {block.get_submodule(name) for name in names}
        with torch.no_grad(), Live() as live, moments.watching(layers):
            for _ in range(3):
                moments.start_batch({})
                runner(hidden=hidden, call=call)
            return live.peak, len(set(moments.sums().values()))

    activations, _ = peak([])
    # Beside the sums there are the rows of one layer's inputs in float32, as they are and about their mean.
    rows = 2 * 8 * 512 * 14_336 * 4
    assert widest < peak(["mlp.down_proj"])[0] < min(widest + activations + rows, 5.6e9)
    others = ["q_proj", "k_proj", "v_proj", "o_proj"]
    found, sums = peak([*(f"self_attn.{name}" for name in others), "mlp.gate_proj", "mlp.up_proj"])
    # q, k and v have one sum, and gate and up have one.
    assert sums == 3 and found < 3 * bytes_needed(block.self_attn.q_proj, ["inputs"]) + activations + rows


def test_solving_the_widest_layer_of_8b() -> None:
    """Matrices grow with the square of the width, so those of a sixteenth of the width say what the whole takes."""
    share = 16
    layer = nn.Linear(14_336 // share, 4096 // share, bias=False, dtype=torch.bfloat16)
    rows = torch.randn(2000, layer.in_features)
    moment = (rows.T @ rows).double() / len(rows)
    shape = layer.out_features, layer.in_features
    entry = LayerStatistics(shape, len(rows), probe_of(layer.weight), moment, rows.mean(0))
    with Live() as live:
        factorize_weight(layer, 100, Activation(0.5), entry)
    assert 2 * moment.nbytes < live.peak + moment.nbytes < 5.6e9 / share**2


def test_memory_for_8b(llama_3_8b: LlamaForCausalLM, tmp_path: Path) -> None:
    names = [name for name, module in llama_3_8b.named_modules() if isinstance(module, nn.Linear)]
    assert block_list(llama_3_8b, names, None) == "model.layers"
    outside = [p for name, p in llama_3_8b.named_parameters() if not name.startswith("model.layers.")]
    assert sum(parameter.nbytes for parameter in outside) < 2.2e9
    saved(llama, tmp_path / "base")
    needed = 20 * 32**2  # of down_proj, with 32 inputs
    data = batches(2, labelled=False)
    with pytest.raises(ValueError, match=rf"max_bytes=20,479 is less than module '.*down_proj' needs .*, {needed:,}"):
        compress_by_block(tmp_path / "base", tmp_path / "out", Activation(0.6), data, max_bytes=needed - 1)
    compress_by_block(tmp_path / "base", tmp_path / "out", Activation(0.6), data, max_bytes=needed, **QUIET)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (Fisher(0.5), {}, "Fisher needs gradients, .*Use Activation, Dictionary, OneShotDictionary or SVD, or load"),
        (Activation(0.5), {"batches": None}, "Activation needs batches"),
        (SVD(0.5), {"batches": None, "sequential": True}, "sequential needs batches"),
        (SVD(0.5, allocation="depth"), {}, "allocation='depth' compares the weights of all blocks; use 'uniform'"),
        (Activation(1.5), {}, "budget=1.5 must be a share"),
        (Activation(1), {}, "The budget of 1 parameters is less than"),
        (Activation(0.5, target_modules="nothing"), {}, "'nothing' matches no linear layer"),
        (Activation(0.5), {"blocks": "model.norm"}, "'model.norm' is no ModuleList .*; 'model.layers' is"),
        (
            Activation(0.5, target_modules=["q_proj", "lm_head"]),
            {"sequential": True},
            "sequential compresses .* in 'model.layers', and 'lm_head' lies outside. Leave it out of target_modules",
        ),
        (Activation(0.5), {"batches": 3}, "batches must be an iterable of batches"),
    ],
)
def test_refused_before_a_shard_is_read(
    method: Any, arguments: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(llama, tmp_path / "base")
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    given = {"batches": [torch.zeros(1, 2, dtype=torch.long)], **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        compress_by_block(tmp_path / "base", tmp_path / "out", method, **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def albert() -> AlbertForMaskedLM:
    return AlbertForMaskedLM(
        AlbertConfig(
            vocab_size=40,
            embedding_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )


def swin() -> SwinForImageClassification:
    return SwinForImageClassification(
        SwinConfig(
            image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
        )
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (t5, "T5ForConditionalGeneration has an encoder and a decoder, "),
        (albert, "'albert.encoder.albert_layer_groups.0' runs 2 times in a batch, not once. Load the model"),
        (swin, "A block gives [0-9]+ tensors, not only hidden states. Load the model, and call calibrate"),
    ],
)
def test_models_that_do_not_go_by_block(make: Any, message: str, tmp_path: Path) -> None:
    model = saved(make, tmp_path / "base")
    batch = {model.main_input_name: torch.ones(2, 1, 16, 16) if make is swin else torch.ones(2, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        compress_by_block(tmp_path / "base", tmp_path / "out", Activation(0.6), [batch], **QUIET)
    assert not (tmp_path / "out").exists()
