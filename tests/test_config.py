"""WaRAConfig: defaults, precedence of ranks, JSON, and every kind of bad value."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
import time
import warnings

import pytest
import torch
from huggingface_hub import metadata_load
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils.other import get_pattern_key
from transformers import HfArgumentParser, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from tests.models import llama
from wara_peft import WaRAConfig
from wara_peft.config_fields import field_types


def test_defaults_have_as_many_parameters_as_lora_of_rank_8():
    config = WaRAConfig()
    assert (config.r, config.levels, config.wavelet, config.form) == (4, 1, "haar", "subband")
    assert config.total_rank == 16
    assert "R=16" in repr(config)


@pytest.mark.parametrize(
    ("fields", "module", "expected"),
    [
        ({}, "a", {"aa1": 4, "ad1": 4, "da1": 4, "dd1": 4, "aa0": 0}),
        ({"r": 2, "levels": 2}, "a", dict.fromkeys(["aa2", "ad2", "da2", "dd2", "ad1", "da1", "dd1"], 2) | {"aa0": 0}),
        ({"form": "shared"}, "a", {"aa1": 4, "dd1": 4}),
        ({"subband_ranks": {"aa1": 8, "dd1": 0}}, "a", {"aa1": 8, "ad1": 4, "da1": 4, "dd1": 0, "aa0": 0}),
        ({"rank_pattern": {"a": 7}}, "x.a", {"aa1": 7, "ad1": 7, "da1": 7, "dd1": 7, "aa0": 0}),
        ({"rank_pattern": {"a": 7}}, "x.b", {"aa1": 4, "ad1": 4, "da1": 4, "dd1": 4, "aa0": 0}),
        # dict in rank_pattern > subband_ranks > int in rank_pattern > r
        (
            {"subband_ranks": {"aa1": 8, "ad1": 5}, "rank_pattern": {"a": {"aa1": 1}}},
            "a",
            {"aa1": 1, "ad1": 5, "da1": 4, "dd1": 4, "aa0": 0},
        ),
        (
            {"subband_ranks": {"aa1": 8}, "rank_pattern": {"a": 2}},
            "a",
            {"aa1": 8, "ad1": 2, "da1": 2, "dd1": 2, "aa0": 0},
        ),
        ({"form": "shared", "rank_pattern": {r"layer\.\d+\.q": 3}}, "layer.11.q", {"aa1": 3, "dd1": 3}),
        (
            {"form": "grid", "levels": 2, "subband_ranks": {"dd2": 1}, "rank_pattern": {"a": {"aa2": 5}}},
            "a",
            {"aa2": 5, "ad1": 4, "da1": 4, "dd1": 4, "ad2": 4, "da2": 4, "dd2": 1},
        ),
        ({"form": "tiny", "subband_ranks": {"aa0": 2}}, "a", {"aa1": 4, "ad1": 4, "da1": 4, "dd1": 4, "aa0": 2}),
    ],
)
def test_precedence_of_ranks(fields, module, expected):
    assert WaRAConfig(**fields).ranks_of(module) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 16),
        ({"form": "shared"}, 8),
        ({"form": "grid", "levels": 2}, 28),
        ({"form": "grid", "grid_pairs": "shared", "levels": 2}, 4),
        ({"form": "tiny", "levels": 2}, 28),
    ],
)
def test_total_ranks(fields, expected):
    assert WaRAConfig(**fields).total_rank == expected


def test_alpha_pattern():
    config = WaRAConfig(wara_alpha=8, alpha_pattern={"q": 2.5})
    assert (config.alpha_of("layer.q"), config.alpha_of("layer.k")) == (2.5, 8)
    assert WaRAConfig().alpha_of("q") is None


class TestNumbersOfALora:
    @pytest.mark.parametrize(
        ("r", "alpha", "fields", "scale"),
        [(16, 32, {}, "0.5"), (8, 8, {}, "0.25"), (8, 16.0, {"levels": 3, "wavelet": "db2"}, "0.2")],
    )
    def test_that_would_scale_otherwise_warn(self, r, alpha, fields, scale):
        lora = rf"scales by {alpha / r:g}; WaRAConfig.from_lora\(LoraConfig\(r={r}, lora_alpha={alpha:g}\)\) keeps"
        with pytest.warns(UserWarning, match=rf"with r={r} scales by {scale}, for R = .* {lora}"):
            config = WaRAConfig(r=r, wara_alpha=alpha, **fields)
        assert config.wara_alpha / config.total_rank == float(scale)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            WaRAConfig.from_lora(LoraConfig(r=r, lora_alpha=alpha), **fields)

    def test_what_from_lora_works_out_does_not(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            config = WaRAConfig.from_lora(LoraConfig(r=16, lora_alpha=4))
        assert (config.r, config.wara_alpha, config.total_rank) == (8, 8, 32)

    @pytest.mark.parametrize(
        "fields",
        [
            {"wara_alpha": 8},  # an r that was not set was not copied
            {"r": 8, "wara_alpha": 24},
            {"r": 8, "wara_alpha": 16, "form": "shared"},
            {"r": 8, "wara_alpha": 16, "use_rslora": True},
            {"r": 8, "wara_alpha": 16, "subband_ranks": {"ad1": 0, "da1": 0}},
            {"r": 8, "wara_alpha": 8, "inference_mode": True},  # as saved ones are
            {"r": 8, "wara_alpha": 8, "module_shapes": {"up": ["Linear", 4, 4]}},
        ],
    )
    def test_others_do_not(self, fields):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            WaRAConfig(**fields)


def test_every_field_survives_json(tmp_path):
    config = WaRAConfig(
        r=3,
        wara_alpha=7.5,
        use_rslora=True,
        wavelet="sym4",
        levels=2,
        subband_ranks={"aa2": 1, "aa0": 2},
        rank_pattern={"q": 5, "k": {"dd1": 0}},
        alpha_pattern={"q": 1.5},
        wara_dropout=0.25,
        init_weights=False,
        target_modules=["q", "k"],
        exclude_modules=["head"],
        bias="wara_only",
        modules_to_save=["head"],
        layers_to_transform=[0],
        layers_pattern="layers",
        trainable_token_indices=[1, 2],
        ensure_weight_tying=True,
        module_shapes={"q": ["Linear", 4, 6]},
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(str(tmp_path))
    assert WaRAConfig.from_pretrained(str(tmp_path)) == config
    assert PeftConfig.from_pretrained(str(tmp_path)) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"form": "grid", "grid_pairs": "shared", "grid_size": (3, 5), "num_prefix_tokens": 2},
        {"form": "tiny", "core": "diagonal", "save_basis": False, "base_weight_hashes": {"q": "0a"}},
        {"init_weights": "activation"},
    ],
)
def test_fields_of_one_form_survive_json(fields, tmp_path):
    config = WaRAConfig(**fields)
    config.save_pretrained(str(tmp_path))
    assert WaRAConfig.from_pretrained(str(tmp_path)) == config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"wavelet": "har"}, ValueError, "wavelet='har' is not a wavelet.*'haar'"),
        ({"wavelet": None}, TypeError, "wavelet=None must be a string"),
        ({"wavelet": ["haar"]}, TypeError, r"wavelet=\['haar'\] must be a string"),
        ({"wavelet": "bior2.2"}, ValueError, "wavelet='bior2.2' is not orthogonal"),
        ({"levels": 0}, ValueError, "levels=0 must be an int from 1 to 64"),
        ({"levels": 1.5}, TypeError, "levels=1.5 must be an int"),
        ({"r": 0}, ValueError, "r=0 must be an int from 1 to 65536"),
        ({"r": -3}, ValueError, "r=-3 must be an int from 1 to 65536"),
        ({"r": True}, TypeError, "r=True must be an int"),
        ({"form": "subbands"}, ValueError, "form='subbands' must be one of 'subband', 'shared'"),
        ({"form": "shared", "levels": 2}, ValueError, "form='shared' has one level, not levels=2"),
        ({"form": "shared", "subband_ranks": {"aa1": 2}}, ValueError, "leave subband_ranks None"),
        ({"form": "shared", "rank_pattern": {"q": {"aa1": 2}}}, ValueError, "must be an int with form='shared'"),
        ({"subband_ranks": {"aa2": 2}}, ValueError, "subband_ranks names the subband 'aa2'.*levels=1.*aa1"),
        ({"subband_ranks": {"aa1": -1}}, ValueError, r"subband_ranks\['aa1'\]=-1 must be an int from 0 to 65536"),
        ({"subband_ranks": 4}, TypeError, "subband_ranks=4 must be a dict from strings to ints or None"),
        ({"subband_ranks": dict.fromkeys(["aa1", "ad1", "da1", "dd1"], 0)}, ValueError, "leaves every subband out"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]=0 must be an int from 1 to 65536"),
        ({"rank_pattern": {"q": {"xx1": 1}}}, ValueError, r"rank_pattern\['q'\] names the subband 'xx1'"),
        ({"rank_pattern": {"(": 2}}, ValueError, r"rank_pattern\['\('\] is not a valid regular expression"),
        ({"alpha_pattern": {"(": 2}}, ValueError, r"alpha_pattern\['\('\] is not a valid regular expression"),
        (
            {"alpha_pattern": {"q": "2"}},
            TypeError,
            r"alpha_pattern=\{'q': '2'\} must be a dict from strings to numbers",
        ),
        ({"alpha_pattern": {1: 2}}, TypeError, r"alpha_pattern=\{1: 2\} must be a dict from strings to numbers"),
        ({"rank_pattern": ["q"]}, TypeError, r"rank_pattern=\['q'\] must be a dict from strings to ints or a dict"),
        ({"use_rslora": "false"}, TypeError, "use_rslora='false' must be True or False"),
        ({"use_rslora": 0.5}, TypeError, "use_rslora=0.5 must be True or False"),
        ({"use_rslora": [1]}, TypeError, r"use_rslora=\[1\] must be True or False"),
        ({"inference_mode": "no"}, TypeError, "inference_mode='no' must be True or False"),
        ({"ensure_weight_tying": 1}, TypeError, "ensure_weight_tying=1 must be True or False"),
        ({"target_modules": 3}, TypeError, "target_modules=3 must be a list of strings or a string or None"),
        ({"modules_to_save": [1]}, TypeError, r"modules_to_save=\[1\] must be a list of strings or None"),
        ({"trainable_token_indices": {"q": "a"}}, TypeError, "trainable_token_indices=.* must be a list of ints or a"),
        ({"layers_to_transform": 0.5}, TypeError, "layers_to_transform=0.5 must be a list of ints or an int or None"),
        ({"wara_alpha": 10**400}, ValueError, r"wara_alpha=2\*\*1328… must be finite"),
        ({"alpha_pattern": {"q": float("inf")}}, ValueError, r"alpha_pattern\['q'\]=inf must be finite"),
        ({"r": 10**15}, ValueError, "r=1000000000000000 must be an int from . to 65536"),
        ({"r": 10**5000}, ValueError, r"r=2\*\*16609… must be an int from . to 65536"),
        (
            {"subband_ranks": {"aa1": 10**9}},
            ValueError,
            r"subband_ranks\['aa1'\]=1000000000 must be an int from",
        ),
        ({"rank_pattern": {"q": 10**9}}, ValueError, r"rank_pattern\['q'\]=1000000000 must be an int from . to 65536"),
        ({"module_shapes": {"q": ["Linear", 4]}}, ValueError, r"module_shapes has \['Linear', 4\] for 'q'"),
        ({"module_shapes": {"q": []}}, ValueError, r"module_shapes has \[\] for 'q'"),
        ({"module_shapes": {"q": [3, 4, 5]}}, ValueError, r"module_shapes has \[3, 4, 5\] for 'q'"),
        ({"module_shapes": {"q": ["Linear", 4, True]}}, ValueError, "module_shapes has"),
        ({"module_shapes": ["q"]}, TypeError, r"module_shapes=\['q'\] must be a dict"),
        ({"wara_alpha": float("nan")}, ValueError, "wara_alpha=nan must be finite"),
        ({"wara_dropout": None}, TypeError, "wara_dropout=None must be a number"),
        ({"wara_dropout": 1.0}, ValueError, "wara_dropout=1.0 must be a probability"),
        ({"bias": "wara"}, ValueError, "bias='wara' must be one of 'none', 'all', 'wara_only'"),
        ({"init_weights": "pissa"}, ValueError, "init_weights='pissa'.*'orthogonal', 'activation'"),
        (
            {"form": "grid", "init_weights": "orthogonal"},
            ValueError,
            "init_weights='orthogonal' is for form='subband'",
        ),
        (
            {"grid_size": (4, 4)},
            ValueError,
            r"grid_size=\(4, 4\) has no meaning with form='subband', only with 'grid'",
        ),
        ({"form": "tiny", "grid_pairs": "shared"}, ValueError, "grid_pairs='shared' has no meaning with form='tiny'"),
        ({"form": "grid", "save_basis": False}, ValueError, "save_basis=False has no meaning with form='grid'"),
        ({"form": "grid", "grid_pairs": "one"}, ValueError, "grid_pairs='one' must be one of 'separate', 'shared'"),
        ({"form": "grid", "grid_size": 7}, TypeError, r"grid_size=7 must be \(an int, an int\) or None"),
        ({"form": "grid", "grid_size": (7, 0)}, ValueError, r"grid_size=\(7, 0\) must be .* at least 1"),
        ({"form": "grid", "num_prefix_tokens": -1}, ValueError, "num_prefix_tokens=-1 must be at least 0"),
        (
            {"form": "grid", "subband_ranks": {"aa0": 1}},
            ValueError,
            "'aa0'; with form='grid' and levels=1 there are aa1",
        ),
        (
            {"form": "grid", "grid_pairs": "shared", "subband_ranks": {"aa1": 1}},
            ValueError,
            "leave subband_ranks None",
        ),
        (
            {"form": "grid", "grid_pairs": "shared", "rank_pattern": {"q": {"aa1": 1}}},
            ValueError,
            "must be an int with grid_pairs='shared'",
        ),
        ({"form": "grid", "task_type": "CAUSAL_LM"}, ValueError, "task_type='CAUSAL_LM'.*leak the future"),
        ({"form": "tiny", "core": "sparse"}, ValueError, "core='sparse' must be one of 'full', 'diagonal'"),
        ({"form": "tiny", "save_basis": 1.5}, TypeError, "save_basis=1.5 must be True or False"),
        ({"lora_alpha": 16}, TypeError, "unexpected keyword argument 'lora_alpha'; its name here is 'wara_alpha'"),
        ({"lora_dropout": 0.1}, TypeError, "'lora_dropout'; its name here is 'wara_dropout'"),
        ({"init_lora_weights": True}, TypeError, "'init_lora_weights'; its name here is 'init_weights'"),
        ({"fan_in_fan_out": True}, TypeError, "'fan_in_fan_out'; leave it out"),
        ({"target_parameters": "experts.weight"}, TypeError, "target_parameters"),
        ({"no_such_field": 1}, TypeError, "unexpected keyword argument 'no_such_field'"),
        ({"target_modules": "q", "layers_to_transform": 1}, ValueError, "`layers_to_transform` cannot be used"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, ValueError, "`layers_to_transform` must also be"),
        ({"task_type": "NOPE"}, ValueError, "Invalid task type"),
    ],
)
def test_bad_values(fields, error, message):
    with pytest.raises(error, match=message):
        WaRAConfig(**fields)


@pytest.mark.parametrize("field", ["a_field_of_a_later_version", "lora_alpha"])
def test_unknown_fields_of_a_saved_config_warn(tmp_path, field):
    WaRAConfig(r=3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 1}))
    with pytest.warns(UserWarning, match=rf"Unexpected keyword arguments \['{field}'\] for class WaRAConfig"):
        assert WaRAConfig.from_pretrained(str(tmp_path)).r == 3


def test_unknown_values_of_a_saved_config_are_errors(tmp_path):
    WaRAConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"form": "fractal"}))
    with pytest.raises(ValueError, match="form='fractal'"):
        PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_match_for_ever_is_refused_in_seconds(field):
    pattern = "(a|aa)+b?c"
    config = WaRAConfig(**{field: {pattern: 2}})
    look_up = config.ranks_of if field == "rank_pattern" else config.alpha_of
    start = time.process_time()
    with pytest.raises(ValueError, match=rf"{field}\['\(a\|aa\)\+b\?c'\] takes more than .* against module 'a+'"):
        look_up("a" * 60)
    assert time.process_time() - start < 10
    assert look_up("layer.aac") in (2, {"aa1": 2, "ad1": 2, "da1": 2, "dd1": 2, "aa0": 0})


@pytest.mark.parametrize("name", ["q", "layer.q", "aq", "layers.3.q", "x", "layers.30.q.x"])
def test_patterns_match_as_in_peft(name):
    patterns = {"q": 1, r"layers\.\d\.q": 2, "^layers.30": 3, "x": 4}
    config = WaRAConfig(alpha_pattern=patterns, wara_alpha=9)
    assert config.alpha_of(name) == patterns.get(get_pattern_key(list(patterns), name), 9)


def test_the_annotations_of_a_class_are_evaluated_once(monkeypatch):
    """Evaluating them took nine tenths of the time in which a config was made."""
    WaRAConfig()
    monkeypatch.setattr(field_types, "get_type_hints", lambda *_, **__: pytest.fail("they are evaluated again"))
    assert WaRAConfig(rank_pattern='{"query": 2}').rank_pattern == {"query": 2}
    with pytest.raises(TypeError, match="r='many' must be an int"):
        WaRAConfig(r="many")


def test_copies_are_equal():
    config = WaRAConfig(rank_pattern={"q": 2})
    assert copy.deepcopy(config) == config == copy.copy(config)


class TestModelCard:
    def test_section_is_added_once_to_the_card_at_hand(self, tmp_path):
        card = tmp_path / "README.md"
        card.write_text("---\nlibrary_name: peft\ntags:\n- mine\n---\n\n# My model\n")
        for _ in range(2):
            WaRAConfig().save_pretrained(str(tmp_path))
        assert "# My model" in card.read_text()
        assert card.read_text().count("import wara_peft\n") == 1
        assert metadata_load(card) == {"library_name": "peft", "tags": ["mine", "wara"]}

    @pytest.mark.parametrize("adapter_name", ["default", "other"])
    def test_the_tag_stays_when_peft_writes_the_card_again(self, adapter_name, tmp_path):
        base = llama(LlamaModel)
        model = get_peft_model(base, WaRAConfig(target_modules=["q_proj"]), adapter_name)
        for _ in range(3):
            model.save_pretrained(tmp_path)
            assert metadata_load(tmp_path / "README.md")["tags"].count("wara") == 1
        assert (tmp_path / "README.md").read_text().count("import wara_peft\n") == 1

    def test_named_adapters_use_the_card_above(self, tmp_path):
        card = tmp_path / "README.md"
        card.write_text("---\nlibrary_name: peft\n---\n\n# My model\n")
        WaRAConfig().save_pretrained(str(tmp_path / "other"))
        assert "import wara_peft" in card.read_text()
        assert not (tmp_path / "other" / "README.md").exists()

    def test_a_strangers_readme_is_left_alone(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text("# A project of mine\n")
        WaRAConfig().save_pretrained(str(tmp_path))
        WaRAConfig().save_pretrained(str(tmp_path / "adapter"))
        assert readme.read_text() == "# A project of mine\n"
        assert "import wara_peft" in (tmp_path / "adapter" / "README.md").read_text()
        assert metadata_load(tmp_path / "adapter" / "README.md") == {"library_name": "peft", "tags": ["wara"]}

    def test_what_is_no_text_does_not_stop_saving(self, tmp_path):
        (tmp_path / "README.md").write_bytes(b"\xff\xfe not text")
        WaRAConfig().save_pretrained(str(tmp_path))
        assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe not text"

    def test_metadata_that_cannot_be_read_get_no_tag(self, tmp_path):
        card = tmp_path / "README.md"
        card.write_bytes(b"---\nlibrary_name: peft\ntags: [broken\n---\n\xff")
        with pytest.warns(UserWarning, match="get no tag 'wara'"):
            WaRAConfig().save_pretrained(str(tmp_path))
        assert card.read_bytes().startswith(b"---\nlibrary_name: peft\ntags: [broken\n---\n\xff")
        assert b"import wara_peft" in card.read_bytes()

    @pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", None])
    def test_the_snippet_loads_the_adapter(self, task_type, tmp_path):
        classes = {"CAUSAL_LM": LlamaForCausalLM, "SEQ_CLS": LlamaForSequenceClassification}
        base = llama(classes.get(task_type, LlamaModel))
        base.save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base")
        config = WaRAConfig(target_modules=["q_proj"], init_weights=False, task_type=task_type)
        model = get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path / "adapter")
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert "wara" in metadata_load(tmp_path / "adapter" / "README.md")["tags"]
        snippet = card.split("```python\n", 2)[-1].split("```")[0]
        names = {}
        exec(snippet.replace("path or name of this adapter", str(tmp_path / "adapter")), names)
        tokens = torch.arange(1, 7)[None]
        with torch.no_grad():
            assert torch.equal(names["model"].eval()(tokens)[0], model(tokens)[0])


class TestCommandLine:
    """`HfArgumentParser`, as scripts and TRL's parser use it."""

    @pytest.mark.parametrize(
        ("arguments", "fields"),
        [
            ([], {}),
            (["--r", "2", "--wara_alpha", "5", "--use_rslora"], {"r": 2, "wara_alpha": 5.0, "use_rslora": True}),
            (["--wavelet", "db2", "--levels=2", "--form", "subband"], {"wavelet": "db2", "levels": 2}),
            (["--subband-ranks", '{"aa1": 8, "dd1": 0}'], {"subband_ranks": {"aa1": 8, "dd1": 0}}),
            (
                ["--rank_pattern", '{"q": 2, "k": {"dd1": 0}}', "--alpha_pattern", '{"q": 2.5}'],
                {"rank_pattern": {"q": 2, "k": {"dd1": 0}}, "alpha_pattern": {"q": 2.5}},
            ),
            (["--init_weights", "False"], {"init_weights": False}),
            (["--init_weights", "orthogonal"], {"init_weights": "orthogonal"}),
            (["--form", "grid", "--grid_size", "[7, 5]"], {"form": "grid", "grid_size": (7, 5)}),
            (["--form", "tiny", "--no_save_basis"], {"form": "tiny", "save_basis": False}),
            (["--target_modules", "all-linear"], {"target_modules": "all-linear"}),
            (["--target_modules", "[qv]_proj"], {"target_modules": "[qv]_proj"}),
            (["--target_modules", '["q_proj", "v_proj"]'], {"target_modules": ["q_proj", "v_proj"]}),
            (
                ["--modules_to_save", "head", "norm", "--bias", "all"],
                {"modules_to_save": ["head", "norm"], "bias": "all"},
            ),
            (
                ["--target_modules", '["q"]', "--layers_to_transform", "0", "--layers_pattern", "h"],
                {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "h"},
            ),
            (
                ["--target_modules", '["q"]', "--layers_to_transform", "[0, 2]"],
                {"target_modules": ["q"], "layers_to_transform": [0, 2]},
            ),
            (["--trainable_token_indices", "[1, 5]"], {"trainable_token_indices": [1, 5]}),
            (["--trainable_token_indices", '{"wte": [2]}'], {"trainable_token_indices": {"wte": [2]}}),
            (["--task_type", "CAUSAL_LM", "--revision", "12"], {"task_type": "CAUSAL_LM", "revision": "12"}),
        ],
    )
    def test_it_is_the_config_of_the_same_values(self, arguments, fields):
        (config,) = HfArgumentParser(WaRAConfig).parse_args_into_dataclasses(arguments, look_for_args_file=False)
        assert config.to_dict() == WaRAConfig(**fields).to_dict()

    def test_help_and_bad_values(self, capsys):
        parser = HfArgumentParser(WaRAConfig)
        assert "--subband_ranks" in parser.format_help()
        for arguments, error, message in [
            (["--subband_ranks", "{'aa1': 8}"], TypeError, "must be a dict from strings to ints or None"),
            (["--rank_pattern", "5"], TypeError, "rank_pattern=5 must be a dict from strings to ints or a dict"),
            (["--layers_to_transform", '["a"]'], TypeError, r"must be a list of ints or an int or None"),
        ]:
            with pytest.raises(error, match=message):
                parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses(["--init_weights", "gaussian"], look_for_args_file=False)
        assert "invalid choice: 'gaussian'" in capsys.readouterr().err

    def test_help_is_what_the_docstring_says_of_each_field(self):
        text = inspect.getdoc(WaRAConfig).partition("Args:\n")[2].partition("\nRaises:")[0]
        own = [item for item in dataclasses.fields(WaRAConfig) if item.name not in PeftConfig.__dataclass_fields__]
        described = [f"{item.name}: {item.metadata['help']}" for item in own]
        assert sorted(described) == sorted(
            " ".join(entry.split()) for entry in re.split(r"\n(?=    \w)", text.strip("\n"))
        )
        shown = " ".join(HfArgumentParser(WaRAConfig).format_help().split())
        assert "numerator of the scaling; None means R of each module" in shown

    def test_loras_config_is_not_taken(self):
        with pytest.raises((TypeError, ValueError)):
            HfArgumentParser(LoraConfig)

    @pytest.mark.parametrize("value", ["[" * 100_000, "9" * 10_000])
    def test_strings_in_files_do_no_harm(self, value):
        assert WaRAConfig(target_modules=value, init_weights=True).target_modules == value
        with pytest.raises(TypeError, match="subband_ranks="):
            WaRAConfig(subband_ranks=value)
        with pytest.raises(TypeError, match="r='4' must be an int"):
            WaRAConfig(r="4")
