"""A WaRA adapter exported as a LoRA: PEFT's own LoRA loads it and computes the same."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertModel

from tests.cases import CASES, SMALL, each_case
from tests.models import bert, llama
from tests.references import Mlp
from wara_peft import WaRAConfig, lora_error, save_as_lora, to_lora
from wara_peft.disk.adapters.adapter import SavedAdapter
from wara_peft.disk.checkpoints.tensors import TensorFile
from wara_peft.layers.base import WaRALayer
from wara_peft.lora import export
from wara_peft.lora.engines import vllm_max_lora_rank

# what some rows warn of
pytestmark = pytest.mark.filterwarnings(
    "ignore:PEFT loads all|PEFT's LoRA |Neither PEFT|If its|This adapter is|levels=|bias='",
    "ignore:Model with `tie_word|Could not find a config file|Setting `save_embedding_layers`",
)


def adapted(name: str) -> tuple[nn.Module, PeftModel, torch.Tensor]:
    case = CASES[name]
    return case.base(), case.adapted(), case.inputs


@each_case("export", parts=SMALL, where=lambda case: bool(case.lora))
def test_lora_computes_the_same(case, tmp_path):
    model = case.adapted()
    expected = case.output(model)
    assert not torch.allclose(expected, case.output(case.base()), atol=1e-2)
    save_as_lora(tmp_path, model)

    loaded = PeftModel.from_pretrained(case.base(), tmp_path)

    assert isinstance(loaded.peft_config["default"], LoraConfig)
    if "unmerged" in case.lora:
        torch.testing.assert_close(case.output(loaded), expected, atol=1e-5, rtol=1e-5)
    if "merged" in case.lora:
        torch.testing.assert_close(case.output(loaded.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


# a LoRA of parameters and of groups lies otherwise, which the test above shows
@each_case(
    "export",
    parts=SMALL,
    where=lambda case: (
        not {"Parameter", "MultiheadAttention", "Experts", "ExpertsInFirst"} & {*case.kinds}
        and case.name not in ("Conv2d, grouped", "Conv2d, depthwise")
    ),
)
def test_it_is_exact_and_uniform(case):
    model = case.adapted()
    config, state_dict = to_lora(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WaRALayer)}
    layers = {name: layer for name, layer in layers.items() if "default" not in layer.tied_to}
    largest = max(layer.total_rank("default") for layer in layers.values())

    assert config.r == config.lora_alpha == largest
    assert not (config.use_rslora or config.use_dora or config.rank_pattern or config.alpha_pattern)
    assert config.target_modules == {name.removeprefix("base_model.model.") for name in layers}
    assert config.base_model_name_or_path == model.peft_config["default"].base_model_name_or_path
    for name, layer in layers.items():
        factor_a, factor_b = (state_dict[f"{name}.{side}"].flatten(1).double() for side in layer.kind.lora_names)
        delta = layer.double().get_delta_weight("default")
        delta = (delta.T if layer.kind.keeps_in_first else delta).flatten(1)
        assert (factor_a.shape, factor_b.shape) == ((largest, delta.shape[1]), (delta.shape[0], largest))
        torch.testing.assert_close(factor_b @ factor_a, delta, atol=1e-6, rtol=1e-6)
    assert all(value.is_contiguous() for value in state_dict.values())
    assert not any("wara" in key for key in state_dict)


def test_files(tmp_path):
    _, model, _ = adapted("linear")
    save_as_lora(tmp_path / "new" / "directory", model)
    found = sorted(path.name for path in (tmp_path / "new" / "directory").iterdir())
    assert found == ["adapter_config.json", "adapter_model.safetensors"]
    keys = set(load_file(tmp_path / "new" / "directory" / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.{m}.lora_{side}.weight" for m in ("up", "down") for side in "AB"}
    config = json.loads((tmp_path / "new" / "directory" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 16, 16)


@each_case("export", "read", parts=SMALL)
def test_a_directory_gives_what_the_model_gives(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config, state_dict = to_lora(tmp_path)
    expected_config, expected = to_lora(model)
    assert state_dict.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state_dict[key], value), key
    # PEFT sets these two when it saves; a directory does not know what other modules the model has
    found, expected = config.to_dict(), expected_config.to_dict()
    found["inference_mode"] = False
    for fields in (found, expected):
        fields |= {"auto_mapping": None, "exclude_modules": None}
        fields["target_parameters"] = sorted(fields["target_parameters"] or [])
    assert found == expected


def test_a_directory_holds_several_adapters(tmp_path):
    _, model, _ = adapted("linear")
    model.add_adapter("other", WaRAConfig(r=1, target_modules=["up"], init_weights=False))
    model.save_pretrained(tmp_path)
    assert to_lora(tmp_path)[0].r == 16
    assert to_lora(str(tmp_path), adapter_name="other")[0].r == 4


class TestTruncation:
    @pytest.mark.parametrize("rank", [1, 4, 9, 30, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("case", ["unequal ranks", "odd sizes", "Conv1D, subband", "shared"])
    def test_is_the_truncated_svd(self, case, rank, tmp_path):
        _, model, _ = adapted(case)
        model.save_pretrained(tmp_path)
        config, state_dict = to_lora(model.double(), rank=rank)
        errors = lora_error(tmp_path, rank)
        layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "wara_A")}
        assert errors.modules.keys() == layers.keys()
        best, norms, kept, whole = {}, {}, {}, 0
        for name, layer in layers.items():
            delta = layer.get_delta_weight("default").detach().numpy()
            delta = delta.T if layer.kind.keeps_in_first else delta
            values = np.linalg.svd(delta, compute_uv=False)
            whole = max(whole, np.linalg.matrix_rank(delta))
            shares = np.cumsum(values**2) / np.sum(values**2)
            kept[name] = rank if isinstance(rank, int) else int(np.sum(shares < rank - 1e-12)) + 1
            best[name], norms[name] = np.linalg.norm(values[kept[name] :]), np.linalg.norm(values)
            prefix = f"base_model.model.{name}.lora_"
            found = state_dict[f"{prefix}B.weight"].numpy() @ state_dict[f"{prefix}A.weight"].numpy()
            assert np.linalg.norm(delta - found) == pytest.approx(best[name], abs=1e-6)
            assert errors.modules[name] == pytest.approx(best[name] / norms[name], abs=1e-6)
        together = np.linalg.norm(list(best.values())) / np.linalg.norm(list(norms.values()))
        assert errors.total == pytest.approx(together, abs=1e-6)
        assert config.r == config.lora_alpha == (min(rank, whole) if isinstance(rank, int) else max(kept.values()))

    def test_dense_update_is_never_built(self, tmp_path):
        model = get_peft_model(nn.Sequential(nn.Linear(4096, 4096)), WaRAConfig(target_modules=["0"], r=1))
        model.save_pretrained(tmp_path)
        with CountLargest() as largest:
            to_lora(tmp_path, rank=2)
        assert largest.elements == 4096 * 4

    def test_groups_each_get_their_share(self):
        model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4))
        model = get_peft_model(model, WaRAConfig(target_modules=["0"], init_weights=False)).double()
        _, state_dict = to_lora(model, rank=8)
        lora_a, lora_b = (state_dict[f"base_model.model.0.lora_{side}.weight"].flatten(1) for side in "AB")
        delta = model.base_model.model[0].get_delta_weight("default").flatten(1).detach().numpy()
        channels = 2 * 9
        for group in range(4):
            rows = lora_a[2 * group : 2 * group + 2, group * channels : (group + 1) * channels]
            found = (lora_b[3 * group : 3 * group + 3] @ rows).numpy()
            values = np.linalg.svd(delta[3 * group : 3 * group + 3], compute_uv=False)
            error = np.linalg.norm(delta[3 * group : 3 * group + 3] - found)
            assert error == pytest.approx(np.linalg.norm(values[2:]), abs=1e-6)
        with pytest.raises(ValueError, match="rank=6 must be a multiple of the 4 groups of the convolution '0'"):
            to_lora(model, rank=6)

    def test_of_a_new_adapter_there_is_nothing_to_lose(self):
        model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"]))
        assert lora_error(model, 1) == (0.0, {"up": 0.0})
        assert to_lora(model, rank=0.9)[0].r == 1


class CountLargest(TorchDispatchMode):
    """Number of elements of the largest floating-point result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                self.elements = max(self.elements, item.numel())
        return result


class TestOnePass:
    """From a directory no tensor is read twice, and every module decomposed once."""

    @pytest.mark.parametrize("case", ["linear", "shared", "tiny", "with a head", "with biases"])
    @pytest.mark.parametrize("rank", [None, 3, 0.9])
    def test_reads_and_decompositions(self, case, rank, tmp_path, monkeypatch):
        _, model, _ = adapted(case)
        model.save_pretrained(tmp_path)
        keys = list(load_file(tmp_path / "adapter_model.safetensors"))
        read = []
        read_them = TensorFile.read

        def counted(self, keys):
            keys = list(keys)
            read.extend(keys)
            return read_them(self, keys)

        monkeypatch.setattr(TensorFile, "read", counted)
        with CountCalls("linalg_svd") as decomposed:
            lora = export.convert(tmp_path, rank)
        assert sorted(read) == sorted(keys)
        modules = len(SavedAdapter(tmp_path).modules)
        assert decomposed.calls == (0 if rank is None else modules)
        if rank is not None:
            read.clear()
            with CountCalls("linalg_svd") as decomposed:
                assert lora_error(tmp_path, rank) == lora.error
            assert decomposed.calls == modules
            assert sorted(read) == sorted(key for key in keys if ".wara_" in key)  # the error is of ΔW only


class CountCalls(TorchDispatchMode):
    """How often an operation runs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += self.name in str(func)
        return func(*args, **(kwargs or {}))


class TestNotFinite:
    """A LoRA never has infinities, and never is called exact with them."""

    @pytest.mark.parametrize(
        ("rank", "alpha", "dtype", "said"),
        [
            (None, 4e8, torch.float16, "float16"),
            (2, 4e16, torch.float16, "float16"),  # the factors of a truncation are as large as each other
            (0.5, 4e16, torch.float16, "float16"),
            (None, 1e300, None, "float32"),
            (2, 1e300, torch.float32, "float32"),
            (0.5, 1e300, torch.bfloat16, "float32"),
        ],
    )
    def test_what_a_dtype_cannot_hold(self, rank, alpha, dtype, said, tmp_path):
        model = get_peft_model(Mlp(), WaRAConfig(target_modules=["up"], init_weights=False, wara_alpha=alpha))
        model.save_pretrained(tmp_path / "wara")
        for source in (model, tmp_path / "wara"):
            with pytest.raises(ValueError, match=f"'up' has values that are not finite in torch.{said}"):
                save_as_lora(tmp_path / "lora", source, rank, dtype=dtype)
        assert not (tmp_path / "lora").exists()

    def test_a_broken_model(self):
        _, model, _ = adapted("linear")
        model.base_model.model.up.wara_B["default"].level1.data[0, 0] = torch.nan
        for convert_it in (to_lora, lora_error):
            with pytest.raises(ValueError, match="ΔW of module 'up' has values that are not finite"):
                convert_it(model, 2)
        with pytest.raises(ValueError, match="ΔW of module 'up' has values that are not finite"):
            to_lora(model)


class TestDtype:
    @pytest.mark.parametrize("case", ["linear", "three levels", "odd sizes", "Conv1D, subband"])
    def test_bfloat16_rounds_once(self, case, tmp_path):
        base, model, x = adapted(case)
        exact = to_lora(model)[1]
        for key, value in to_lora(model, dtype=torch.bfloat16)[1].items():
            assert torch.equal(value, exact[key].bfloat16())
        save_as_lora(tmp_path, model, dtype=torch.bfloat16)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        expected = model(x)
        assert (loaded(x) - expected).norm() <= 2e-2 * expected.norm()

    def test_an_adapter_in_bfloat16(self, tmp_path):
        base, model, x = adapted("linear")
        base, model, x = base.bfloat16(), model.bfloat16(), x.bfloat16()
        assert {value.dtype for value in to_lora(model)[1].values()} == {torch.bfloat16}
        assert {value.dtype for value in to_lora(model, dtype=torch.float32)[1].values()} == {torch.float32}
        save_as_lora(tmp_path, model)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False).eval()
        expected = model(x).float()
        assert (loaded(x).float() - expected).norm() <= 2e-2 * expected.norm()


class TestEngines:
    @pytest.mark.filterwarnings("default")
    @pytest.mark.parametrize(
        ("model", "fields", "named"),
        [
            (Mlp(), {"target_modules": ["up"], "modules_to_save": ["head"]}, "'head.weight'"),
            (Mlp(), {"target_modules": ["up"], "bias": "wara_only"}, "'up.base_layer.bias'"),
            (nn.Sequential(nn.Embedding(9, 8)), {"target_modules": ["0"]}, r"Embedding layers \('0'\)"),
            (nn.Sequential(nn.Conv1d(8, 8, 3)), {"target_modules": ["0"]}, r"Conv1d layers \('0'\)"),
        ],
    )
    def test_what_they_do_not_take_is_named(self, model, fields, named, tmp_path):
        model = get_peft_model(copy.deepcopy(model), WaRAConfig(**fields))
        with pytest.warns(UserWarning, match=rf"engines that serve LoRA take adapters of linear layers.*{named}"):
            to_lora(model)
        model.save_pretrained(tmp_path / "wara")
        for source in (model, tmp_path / "wara"):
            with pytest.raises(ValueError, match=rf"{named}.*Merge the adapter instead"):
                save_as_lora(tmp_path / "lora", source, strict=True)
        assert not (tmp_path / "lora").exists()

    @pytest.mark.filterwarnings("error")
    def test_linear_layers_alone_are_fine(self):
        """Neither the warning, an error here, nor the error is raised, and nothing is left out."""
        _, model, _ = adapted("linear")
        config, state_dict = to_lora(model)
        strict_config, strict_state_dict = to_lora(model, strict=True)
        modules = {"up", "down"}
        assert strict_config.target_modules == config.target_modules == modules
        names = {f"base_model.model.{module}.lora_{part}.weight" for module in modules for part in "AB"}
        assert strict_state_dict.keys() == state_dict.keys() == names
        assert all(torch.equal(strict_state_dict[name], state_dict[name]) for name in names)

    @pytest.mark.parametrize(
        ("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (40, 64), (256, 256), (257, 320), (512, 512), (513, None)]
    )
    def test_rank_for_vllm(self, rank, allowed):
        assert vllm_max_lora_rank(rank) == allowed


def test_adapter_of_another_name():
    _, model, _ = adapted("linear")
    model.add_adapter("other", WaRAConfig(r=1, target_modules=["up"], init_weights=False))
    config, state_dict = to_lora(model, adapter_name="other")
    assert config.r == 4
    assert set(state_dict) == {"base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"}
    delta = model.base_model.model.up.get_delta_weight("other")
    product = state_dict["base_model.model.up.lora_B.weight"] @ state_dict["base_model.model.up.lora_A.weight"]
    torch.testing.assert_close(product, delta)


@pytest.mark.parametrize("rank", [None, 16])
def test_adapters_of_transformers(rank, tmp_path):
    base = bert(BertModel)
    model = copy.deepcopy(base)
    model.add_adapter(WaRAConfig(target_modules=["query", "dense"], init_weights=False))
    save_as_lora(tmp_path, model, rank=rank)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    tokens = torch.arange(1, 7).view(1, 6)
    expected = model.eval()(tokens).last_hidden_state
    assert not torch.allclose(expected, base(tokens).last_hidden_state, atol=1e-2)
    torch.testing.assert_close(loaded(tokens).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


class TestItsOwnDirectory:
    """An adapter is not overwritten by what is made of it."""

    def test_is_refused(self, tmp_path):
        _, model, _ = adapted("linear")
        model.save_pretrained(tmp_path / "wara")
        (tmp_path / "link").symlink_to(tmp_path / "wara")
        before = {path.name: path.read_bytes() for path in (tmp_path / "wara").iterdir()}
        for target in (tmp_path / "wara", tmp_path / "link", f"{tmp_path}/lora/../wara"):
            with pytest.raises(ValueError, match="must not be replaced"):
                save_as_lora(target, tmp_path / "wara")
        assert {path.name: path.read_bytes() for path in (tmp_path / "wara").iterdir()} == before
        save_as_lora(tmp_path / "wara" / "lora", tmp_path / "wara")  # which may lie inside
        assert SavedAdapter(tmp_path / "wara").config.peft_type == "WARA"

    def test_of_an_adapter_with_a_name(self, tmp_path):
        _, model, _ = adapted("linear")
        model.add_adapter("other", WaRAConfig(r=1, target_modules=["up"], init_weights=False))
        model.save_pretrained(tmp_path)
        for target in (tmp_path, tmp_path / "other"):  # the first of these holds the default adapter
            with pytest.raises(ValueError, match="must not be replaced"):
                save_as_lora(target, tmp_path, adapter_name="other")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_modules_that_share_a_weight_are_saved(tmp_path):
    base = llama(tie_word_embeddings=True)
    config = WaRAConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(copy.deepcopy(base), config)
    model.get_input_embeddings().weight.data.mul_(2.0)
    save_as_lora(tmp_path, model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(tensors[f"base_model.model.{name}.weight"], 2.0 * base.lm_head.weight)


class TestBadInput:
    def test_unknown_adapter(self):
        _, model, _ = adapted("linear")
        with pytest.raises(ValueError, match="no adapter 'other', only 'default'"):
            to_lora(model, adapter_name="other")
        with pytest.raises(ValueError, match="no adapter 'default', only none"):
            to_lora(Mlp())

    def test_adapter_of_another_method(self):
        with pytest.raises(TypeError, match="is of type LORA, not WARA"):
            to_lora(get_peft_model(Mlp(), LoraConfig(target_modules=["up"])))

    @pytest.mark.parametrize(
        ("rank", "error", "message"),
        [
            (0, ValueError, "rank=0 must be an int of at least 1"),
            (-3, ValueError, "rank=-3 must be an int of at least 1"),
            (0.0, ValueError, r"rank=0\.0 .* a float in \(0, 1\]: the share of the energy"),
            (1.5, ValueError, r"rank=1\.5 .* a float in \(0, 1\]"),
            (float("nan"), ValueError, "rank=nan must be"),
            (True, TypeError, "rank=True must be an int"),
            ("4", TypeError, "rank='4' must be an int"),
        ],
    )
    def test_rank(self, rank, error, message):
        _, model, _ = adapted("linear")
        for convert in (to_lora, lora_error):
            with pytest.raises(error, match=message):
                convert(model, rank)

    def test_a_rank_above_R_is_R(self):
        _, model, _ = adapted("linear")
        config, tensors = to_lora(model)
        more_config, more = to_lora(model, 1000)
        assert more_config.r <= config.r and more.keys() == tensors.keys()
        for key in tensors:
            if "lora_A" in key:
                other = key.replace("lora_A", "lora_B")
                torch.testing.assert_close(more[other] @ more[key], tensors[other] @ tensors[key])

    def test_dtype(self):
        _, model, _ = adapted("linear")
        for dtype in ("bf16", torch.int8, torch.float8_e4m3fn):
            with pytest.raises(TypeError, match=r"must be a floating-point torch\.dtype"):
                to_lora(model, dtype=dtype)

    def test_neither_model_nor_path(self, tmp_path):
        with pytest.raises(TypeError, match=r"to_lora\(model, rank\): model must be an nn.Module or a path, and is 7"):
            to_lora(7)
        with pytest.raises(FileNotFoundError, match="There is no adapter directory"):
            save_as_lora(tmp_path / "lora", tmp_path / "nowhere")
        assert not (tmp_path / "lora").exists()

    def test_path_is_a_file(self, tmp_path):
        _, model, _ = adapted("linear")
        path = tmp_path / "file"
        path.write_text("mine")
        with pytest.raises(ValueError, match="is a file; name a directory"):
            save_as_lora(path, model)
        assert path.read_text() == "mine"
