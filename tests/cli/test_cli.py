"""The installed command `wara-peft`: run as a process for what it does, and in this one for what it says.

Most processes are forks of one that has imported the libraries, which takes seven seconds; one is the command itself.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from tests.forked_python import run_python
from tests.layers.test_parameters import EXPERTS, qwen3_moe
from wara_peft import WaRAConfig, to_lora
from wara_peft.disk.checkpoints.tensors import TensorFile
from wara_peft_cli.app import app

COMMAND = Path(sys.executable).parent / "wara-peft"
TOKENS = torch.arange(1, 7).view(1, 6)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


def run_fork(
    *arguments: object, cwd: Path, before: str = "", call: str = "main()"
) -> subprocess.CompletedProcess[str]:
    """Run the command in a fork, in a folder.

    Args:
        arguments: the command's.
        cwd: the folder.
        before: code that runs before the command.
        call: code that runs the command.
    """
    code = f"import sys\nfrom wara_peft_cli import main\nsys.argv = {['wara-peft', *map(str, arguments)]!r}\n"
    return run_python(
        "-c", f"{code}{textwrap.dedent(before)}\n{textwrap.dedent(call)}", cwd=cwd, env={"COLUMNS": "120"}
    )


def say(*arguments: object) -> Result:
    """The same in this process, which has what takes seconds to import."""
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="wara-peft", env={"COLUMNS": "120"})


def complaints(result: subprocess.CompletedProcess[str] | Result) -> list[str]:
    """What the command itself says on stderr; libraries may have their own to say when they are imported."""
    assert "Traceback" not in result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("wara-peft: ")]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes)).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A sharded base model and an adapter on it."""
    path = tmp_path_factory.mktemp("made")
    llama().save_pretrained(path / "base", max_shard_size="8KB")
    config = WaRAConfig(target_modules="all-linear", init_weights=False, wavelet="db2", task_type="CAUSAL_LM", r=3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path / "base"), config)
    model.save_pretrained(path / "adapter")
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


class TestExport:
    @pytest.mark.slow
    def test_exact(self, made, tmp_path):
        result = run("export", made / "adapter", tmp_path / "lora", "--strict")
        assert result.returncode == 0, result.stderr
        assert "LoRA of rank 12, 14 modules" in result.stdout
        assert "vLLM needs: --max-lora-rank 16" in result.stdout
        wara = PeftModel.from_pretrained(llama(), made / "adapter")
        lora = PeftModel.from_pretrained(llama(), tmp_path / "lora")
        assert (logits(wara) - logits(llama())).abs().max() > 0.1
        torch.testing.assert_close(logits(lora), logits(wara), atol=1e-5, rtol=1e-5)
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(made / "base")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]

    @pytest.mark.parametrize(("option", "value"), [("--rank", 2), ("--energy", 0.7)])
    def test_truncated(self, made, tmp_path, option, value):
        result = say("export", made / "adapter", tmp_path / "lora", option, value, "--dtype", "bf16")
        assert result.exit_code == 0, result.stderr
        config, expected = to_lora(made / "adapter", value, dtype=torch.bfloat16)
        assert f"LoRA of rank {config.r}," in result.stdout
        assert "Relative error of the weight update, in Frobenius norm: 0." in result.stdout
        with safe_open(tmp_path / "lora" / "adapter_model.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(expected)
            for key, value in expected.items():
                found = file.get_tensor(key)
                assert (found.dtype, found.shape) == (torch.bfloat16, value.shape)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ([], "It is exact.\n"),
            (["--dtype", "fp32"], "It is exact.\n"),
            (["--dtype", "bf16"], "It is exact, but for the rounding to bfloat16.\n"),
            (["--rank", 3, "--dtype", "bf16"], ", but for the rounding to bfloat16.\n"),
        ],
    )
    def test_says_how_exact_it_is(self, made, tmp_path, options, said):
        assert said in say("export", made / "adapter", tmp_path / "lora", *options).stdout

    def test_values_that_a_dtype_cannot_hold(self, tmp_path):
        model = get_peft_model(llama(), WaRAConfig(target_modules=["q_proj"], init_weights=False, wara_alpha=4e8))
        model.save_pretrained(tmp_path / "adapter")
        result = say("export", tmp_path / "adapter", tmp_path / "lora", "--dtype", "fp16")
        assert result.exit_code == 1
        (line,) = complaints(result)
        assert "q_proj' has values that are not finite in torch.float16: export it in a wider dtype" in line
        assert not result.stdout
        assert not (tmp_path / "lora").exists()

    @pytest.mark.parametrize("options", [[], ["--rank", 2], ["--energy", 0.7]])
    def test_reads_each_tensor_once(self, made, tmp_path, options, monkeypatch):
        read: list[str] = []
        read_them = TensorFile.read

        def counted(self, keys):
            keys = list(keys)
            read.extend(keys)
            return read_them(self, keys)

        monkeypatch.setattr(TensorFile, "read", counted)
        assert say("export", made / "adapter", tmp_path / "lora", *options).exit_code == 0
        with safe_open(made / "adapter" / "adapter_model.safetensors", framework="pt") as file:
            assert sorted(read) == sorted(file.keys())

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [[], ["--overwrite"]])
    def test_of_two_to_one_place_one_succeeds(self, made, tmp_path, options):
        """Whether they meet, or one comes after the other, which then finds the place taken."""
        said_in = [tmp_path / "said" / str(number) for number in range(3)]
        said_in[0].parent.mkdir()
        together = f"""
            import os, wara_peft.lora.export
            children = []
            for path in {list(map(str, said_in))}:
                children.append(os.fork())
                if not children[-1]:
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)
                    main()
            print("codes", *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
        """
        result = run_fork("export", made / "adapter", tmp_path / "lora", *options, cwd=tmp_path, call=together)
        codes = [int(code) for code in result.stdout.splitlines()[-1].removeprefix("codes ").split()]
        said = [path.read_text() for path in said_in]
        shutil.rmtree(said_in[0].parent)
        assert len(codes) == 3
        assert codes.count(0) == 1 or (options and 0 in codes), said
        assert all(code == 0 or "Traceback" not in text for code, text in zip(codes, said, strict=True))
        assert [path.name for path in tmp_path.iterdir()] == ["lora"]
        config, _ = to_lora(made / "adapter")
        assert PeftModel.from_pretrained(llama(), tmp_path / "lora").peft_config["default"].r == config.r

    def test_strict(self, tmp_path):
        model = get_peft_model(llama(), WaRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        model.save_pretrained(tmp_path / "adapter")
        result = say("export", tmp_path / "adapter", tmp_path / "lora", "--strict")
        assert result.exit_code == 1
        (line,) = complaints(result)
        assert "'lm_head.weight'" in line
        result = say("export", tmp_path / "adapter", tmp_path / "lora")
        assert result.exit_code == 0
        (line,) = complaints(result)
        assert line.startswith("wara-peft: warning: PEFT loads all of this LoRA")


class TestExportForEngines:
    @pytest.mark.parametrize(
        ("engine", "said"), [("vllm", "vLLM needs: --max-lora-rank 16"), ("sglang", "SGLang needs:")]
    )
    def test_experts(self, tmp_path, monkeypatch, engine, said):
        monkeypatch.chdir(tmp_path)
        qwen3_moe().save_pretrained("base")
        fields = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "init_weights": False}
        get_peft_model(qwen3_moe(), WaRAConfig(**fields)).save_pretrained("adapter")
        result = say("export", "adapter", "lora", "--for", engine, "--base", "base")
        assert result.exit_code == 0, result.stderr
        assert result.stdout.splitlines()[:2] == [
            "Wrote lora: LoRA of rank 16, 26 modules.",  # of 2 layers: q_proj, and three projections of 4 experts
            "It is exact.",
        ]
        assert result.stdout.splitlines()[2].startswith(said)

    @pytest.mark.parametrize(
        ("arguments", "status", "said"),
        [
            (["--for", "vllm", "--rank", "513"], 1, "vllm serves no LoRA of rank 513, and 512 at most"),
            (["--for", "vllm", "--base", "nowhere"], 1, "There is no model directory 'nowhere'."),
            (["--for", "diffusers", "--format", "peft"], 2, "--for diffusers reads --format diffusers, not peft"),
            (["--for", "vllm-3d", "--base", "base"], 2, "--base is for --format gguf, and for experts"),
            (["--for", "tgi"], 2, "'tgi' is not one of 'peft', 'vllm', 'vllm-3d', 'sglang', 'llama.cpp', 'diffusers'"),
        ],
    )
    def test_what_cannot_be_exported(self, made, tmp_path, monkeypatch, arguments, status, said):
        monkeypatch.chdir(tmp_path)
        result = say("export", made / "adapter", "lora", *arguments)
        assert result.exit_code == status
        assert said in " ".join(re.sub("[│╭╮╰╯─]", "", result.stderr).split())
        assert not result.stdout and not any(tmp_path.iterdir())


class TestExportToGguf:
    def test_files_and_what_it_prints(self, made, tmp_path):
        gguf = pytest.importorskip("gguf")
        lora, modelfile = tmp_path / "my lora.gguf", tmp_path / "my lora.Modelfile"
        result = say("export", made / "adapter", lora, "--format", "gguf", "--base", made / "base")
        assert result.exit_code == 0, result.stderr
        assert result.stdout.splitlines() == [
            f"Wrote {lora}: LoRA of rank 12, 14 modules.",
            "It is exact.",
            f"llama.cpp: llama-server -m BASE.gguf --lora '{lora}'",
            f"Ollama: ollama create NAME -f '{modelfile}'",
        ]
        assert sorted(tmp_path.iterdir()) == [modelfile, lora]
        assert modelfile.read_text() == f"FROM {made / 'base'}\nADAPTER ./my lora.gguf\n"
        _, expected = to_lora(made / "adapter")
        found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(lora).tensors}
        assert len(found) == len(expected)
        value = expected["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
        assert (found["blk.1.ffn_up.weight.lora_b"] == value.numpy()).all()

    def test_what_is_there_stays_without_overwrite(self, made, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        arguments = ["export", made / "adapter", "lora.gguf", "--format", "gguf", "--base", made / "base"]
        for name in ("lora.Modelfile", "lora.gguf"):
            Path(name).write_text("mine")
            with monkeypatch.context() as reading:
                reading.setattr(TensorFile, "read", None)
                result = say(*arguments)
            assert result.exit_code == 1
            (line,) = complaints(result)
            assert line.startswith(f"wara-peft: '{name}' exists already; name another file, or overwrite it")
            assert os.listdir() == [name] and Path(name).read_text() == "mine"
            result = say(*arguments, "--overwrite")
            assert result.exit_code == 0, result.stderr
            assert sorted(os.listdir()) == ["lora.Modelfile", "lora.gguf"]
            assert b"mine" not in Path(name).read_bytes()
            for path in tmp_path.iterdir():
                path.unlink()

    @pytest.mark.parametrize(
        ("arguments", "status", "said"),
        [
            (["lora.gguf"], 2, "--format gguf needs --base"),
            (["lora.gguf", "--for", "llama.cpp"], 2, "--for llama.cpp needs --base"),
            (
                ["lora", "--format", "peft", "--base", "base"],
                2,
                "--base is for --format gguf, and for experts",
            ),
            (["lora.gguf", "--for", "vllm", "--base", "base"], 2, "--for vllm reads --format peft, not gguf"),
            (["lora.gguf", "--component", "unet", "--base", "base"], 2, "--component, are for --format diffusers"),
            (["lora", "--base", "base"], 1, "path='lora' must be the name of a file that ends in '.gguf'"),
            (["lora.gguf", "--base", "nowhere"], 1, "There is no model directory 'nowhere'."),
            (["lora.gguf", "--base", "adapter"], 1, "It is the directory of an adapter, not of a model."),
            (["lora.gguf", "--base", "text"], 1, "Cannot use 'text' as a base model in GGUF: "),
            (["text/lora.gguf", "--base", "base"], 1, "which is a file; name another place."),
            (["lora.gguf", "--base", "gpt2"], 1, "is of the architecture 'gpt2', and GGUF adapters are written for"),
        ],
    )
    def test_what_cannot_be_exported(self, made, tmp_path, monkeypatch, arguments, status, said):
        monkeypatch.chdir(tmp_path)
        for name in ("base", "adapter"):
            Path(name).symlink_to(made / name)
        Path("text").write_text("no model")
        GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)).save_pretrained("gpt2")
        before = sorted(os.listdir())
        result = say("export", "adapter", *([] if "peft" in arguments else ["--format", "gguf"]), *arguments)
        assert result.exit_code == status
        assert said in " ".join(re.sub("[│╭╮╰╯─]", "", result.stderr).split())
        assert not result.stdout
        assert sorted(os.listdir()) == before

    def test_an_adapter_of_another_base(self, made, tmp_path):
        sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "other")
        arguments = ["--format", "gguf", "--base", tmp_path / "other"]
        result = say("export", made / "adapter", tmp_path / "lora.gguf", *arguments)
        assert result.exit_code == 1
        (line,) = complaints(result)
        assert "The adapter was trained on another base than" in line
        assert os.listdir(tmp_path) == ["other"]

    def test_without_the_package(self, made, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "gguf", None)
        arguments = ["--format", "gguf", "--base", made / "base"]
        result = say("export", made / "adapter", tmp_path / "lora.gguf", *arguments)
        assert result.exit_code == 1
        (line,) = complaints(result)
        assert line.startswith("wara-peft: format='gguf' needs the package gguf: pip install gguf (")
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_interrupted(self, made, tmp_path, number):
        """The signal comes when all is written, and nothing has its name yet."""
        signals = f"""
            import os
            import wara_peft.lora.export as export
            export.write_adapter = lambda file, *_: (file.write_text("half"), os.kill(os.getpid(), {int(number)}))
        """
        options = ["--format", "gguf", "--base", made / "base"]
        process = run_fork("export", made / "adapter", "lora.gguf", *options, cwd=tmp_path, before=signals)
        left = sorted(path.name for path in tmp_path.iterdir())
        if number == signal.SIGTERM:
            assert process.returncode == 1 and "interrupted; nothing was written." in process.stderr
            assert left == []
            return
        assert process.returncode == -signal.SIGKILL
        assert len(left) == 4 and not (tmp_path / "lora.gguf").read_bytes()
        result = say("export", made / "adapter", tmp_path / "lora.gguf", *options)
        assert result.exit_code == 0, result.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.Modelfile", "lora.gguf"]


class TestMerge:
    @pytest.mark.slow
    def test_equals_merge_and_unload(self, made, tmp_path):
        result = run_fork("merge", made / "base", made / "adapter", "merged", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        expected = PeftModel.from_pretrained(llama(), made / "adapter").merge_and_unload()
        for name, value in expected.state_dict().items():
            assert torch.equal(merged.state_dict()[name], value), name

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [[], ["--dequantize", "--quantization", "nf4"]])
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_interrupted(self, tmp_path, number, options):
        """A base of many shards, so that the signal meets the merge while it writes."""
        sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=4000, **sizes))
        model.save_pretrained(tmp_path / "base", max_shard_size="4MB")
        model = get_peft_model(model, WaRAConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / "adapter")
        signals = f"""
            import glob, os, threading, time
            def meet():
                while not glob.glob(".merged.*/model-00002*"):
                    time.sleep(0.002)
                os.kill(os.getpid(), {int(number)})
            threading.Thread(target=meet, daemon=True).start()
        """
        process = run_fork("merge", "base", "adapter", "merged", *options, cwd=tmp_path, before=signals)
        said = process.stderr
        left = sorted(path.name for path in tmp_path.iterdir())
        if number == signal.SIGTERM:
            assert process.returncode == 1, said
            assert "wara-peft: interrupted; nothing was written." in said
            assert left == ["adapter", "base"]
            return
        assert process.returncode == -signal.SIGKILL
        assert left[0].startswith(".merged.")
        assert left[1:] == ["adapter", "base", "merged"]
        assert not list((tmp_path / "merged").iterdir())
        result = say("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", *options)
        assert result.exit_code == 0, result.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


class TestInspect:
    def test_tables(self, made):
        result = say("inspect", made / "adapter")
        assert result.exit_code == 0, result.stderr
        for text in (
            "model.layers.1.mlp.down_proj",
            "32 x 48",
            "3 in each of 4",
            "14 modules",
            "as LoRA of rank 12",
            "aa1",
        ):
            assert text in result.stdout
        assert "level 1" in result.stdout

    def test_each_table_of_shares_adds_up_to_one_whole(self, made):
        lines = say("inspect", made / "adapter").stdout.splitlines()
        tables: list[list[float]] = []
        for line in lines:
            if "share of energy" in line:
                tables.append([])
            elif tables and (share := re.search(r"([\d.]+)% +│$", line)):
                tables[-1].append(float(share[1]))
        assert [len(table) for table in tables] == [4, 2]
        for table in tables:
            assert sum(table) == pytest.approx(100, abs=0.3)

    def test_plot_says_what_it_wrote(self, made, tmp_path):
        result = say("inspect", made / "adapter", "--plot", tmp_path / "energy.png")
        assert f"Wrote {tmp_path / 'energy.png'}: " in result.stdout and (tmp_path / "energy.png").is_file()
        result = say("inspect", made / "adapter", "--json", "--plot", tmp_path / "other.png")
        json.loads(result.stdout)
        assert f"Wrote {tmp_path / 'other.png'}: " in result.stderr and (tmp_path / "other.png").is_file()

    @pytest.mark.slow
    def test_json_and_plot(self, made, tmp_path):
        result = run_fork("inspect", made / "adapter", "--json", "--plot", "energy.png", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["rank"] == 12
        assert len(report["modules"]) == 14
        assert sum(report["energy_shares"].values()) == pytest.approx(1.0)
        assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")


FOREIGN = "\x1b[31m[bold]:smile:[/red]\r\x9b2J\u202e\n"
ESCAPED = r"\x1b[31m[bold]:smile:[/red]\r\x9b2J\u202e\n"


class TestForeignText:
    """It is printed as it is, and what a terminal would obey as an escape."""

    @pytest.fixture
    def adapter(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        model = nn.ModuleDict({"[bold]up[/red]": nn.Linear(4, 4), "head[/]": nn.Linear(4, 4)})
        config = WaRAConfig(target_modules=["[bold]up[/red]"], modules_to_save=["head[/]"])
        get_peft_model(model, config).save_pretrained("adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": FOREIGN}))
        return path

    def test_inspect(self, adapter):
        result = say("inspect", "adapter")
        assert result.exit_code == 0, result.stderr
        assert f"base model: {ESCAPED}\n" in result.stdout
        assert "[bold]up[/red]" in result.stdout
        assert "in full: head[/].bias, head[/].weight" in result.stdout
        assert json.loads(say("inspect", "adapter", "--json").stdout)["base_model"] == FOREIGN

    @pytest.mark.parametrize("name", ["lora[/v2]", "[red]lora", "lora\x1b[31m", ":smile:"])
    def test_paths(self, adapter, name):
        result = say("export", "adapter", name)
        assert result.exit_code == 0, result.stderr
        assert f"Wrote {name}:".replace("\x1b", r"\x1b") in result.stdout
        assert Path(name, "adapter_model.safetensors").is_file()

    @pytest.mark.parametrize("options", [[], ["--debug"]])
    def test_errors(self, adapter, options):
        adapter.write_text(json.dumps({"peft_type": "WARA", "wavelet": FOREIGN}))
        for arguments in (["inspect", "adapter"], ["export", FOREIGN, "lora"], ["merge", "[/base]", "adapter", "out"]):
            result = say(*arguments, *options)
            assert result.exit_code == 1
            assert result.stderr.endswith("\n")
            assert not set(result.stderr) & set("\x1b\x9b\u202e\r")
        assert "[/base]" in result.stderr

    def test_warnings(self, adapter):
        fields = json.loads(adapter.read_text())
        adapter.write_text(json.dumps({**fields, "unheard[/of]\x1b": 1}))
        result = say("inspect", "adapter")
        assert result.exit_code == 0
        assert any("unheard[/of]" in line for line in complaints(result))
        assert "\x1b" not in result.stderr


class TestImports:
    """What one subcommand uses cannot stop the others."""

    @pytest.mark.slow
    def test_without_what_merging_uses(self, made, tmp_path):
        for name in ("core_model_loading", "conversion_mapping"):
            code = f"""
                import sys, wara_peft
                sys.modules["transformers.{name}"] = None  # from here on it cannot be imported
                from wara_peft_cli.app import app
                for arguments in (["inspect", "adapter"], ["export", "adapter", "{tmp_path}/{name}"]):
                    app(arguments, standalone_mode=False)
                print("both ran")
                app(["merge", "base", "adapter", "{tmp_path}/merged"])
            """
            result = run_python("-c", textwrap.dedent(code), cwd=made)
            assert "both ran" in result.stdout, result.stderr
            assert result.returncode == 1
            (line,) = complaints(result)
            assert f"transformers.{name}" in line


class TestUsage:
    def test_version(self):
        result = say("--version")
        assert (result.exit_code, result.stdout) == (0, f"wara-peft {importlib.metadata.version('wara-peft')}\n")

    def test_export_alone_shows_its_help(self):
        result = say("export")
        assert result.exit_code == 2 and "Examples:" in result.stdout + result.stderr

    @pytest.mark.parametrize("command", ["export", "merge", "combine", "inspect"])
    def test_help_has_examples(self, command):
        result = say(command, "--help")
        assert result.exit_code == 0
        assert f"wara-peft {command} my-" in result.stdout.split("Examples:")[1]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["export", "a"], "Missing argument 'OUT'"),
            (["export", "a", "--rank", "2"], "Missing argument 'OUT'"),
            (["merge", "a"], "Missing argument 'ADAPTER'"),
            (["merge", "a", "b"], "Missing argument 'OUT'"),
            (["inspect"], "Missing argument 'ADAPTER'"),
            (["run"], "Missing argument 'PROGRAM'"),
            (["frobnicate"], "No such command 'frobnicate'"),
            (["export", "a", "b", "--rank", "2", "--energy", "0.5"], "give --rank or --energy, not both"),
            (["export", "a", "b", "--rank", "0"], "Invalid value for '--rank'"),
            (["export", "a", "b", "--energy", "1.5"], "--energy 1.5 is a share"),
            (["export", "a", "b", "--dtype", "int8"], "'int8' is not one of fp32"),
            (["merge", "a", "b", "c", "--device", "abacus"], "Invalid value for '--device': 'abacus': "),
            (
                ["compress", "a", "b", "--budget", "1", "--device", "abacus"],
                "Invalid value for '--device': 'abacus': ",
            ),
            (["compress", "a", "b", "--budget", "1", "--solver", "nmf"], "'nmf' is not one of 'svd', 'fisher'"),
            (["compress", "a", "b", "--budget", "1", "--allocation", "all"], "'all' is not one of 'uniform'"),
            (["compress", "a", "b", "--budget", "1", "--cost", "money"], "'money' is not one of 'bytes'"),
        ],
    )
    def test_misuse(self, arguments, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = say(*arguments)
        assert result.exit_code == 2
        assert said in result.stderr
        assert not list(tmp_path.iterdir())


LIMITED_FILE_SIZE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
"""Make writing fail half way, as on a full disk."""


class TestFailures:
    """Each ends with exit status 1, one clear line, and nothing left behind."""

    def fails(self, said: str, *arguments: object) -> None:
        before = sorted(Path().rglob("*"))
        result = say(*arguments)
        assert result.exit_code == 1, result.stderr
        (line,) = complaints(result)
        assert said in line
        assert sorted(Path().rglob("*")) == before

    @pytest.fixture
    def copied(self, made, tmp_path, monkeypatch) -> Path:
        monkeypatch.chdir(shutil.copytree(made, tmp_path / "copied"))
        return Path()

    def test_no_adapter(self, copied):
        self.fails("There is no adapter directory 'nowhere'", "export", "nowhere", "lora")
        self.fails("There is no directory 'no/where', and the Hub", "inspect", "no/where")

    @pytest.mark.parametrize("command", [["export", "adapter", "out"], ["merge", "base", "adapter", "out"]])
    def test_out(self, copied, command):
        (copied / "out").write_text("mine")
        self.fails("'out' is a file; name a directory", *command)
        self.fails("'out' is a file; name a directory", *command, "--overwrite")
        (copied / "out").unlink()
        (copied / "out").mkdir()
        (copied / "out" / "file").write_text("mine")
        self.fails("'out' exists already", *command)
        self.fails("adapter_config.json', which is a file", *command[:-1], "adapter/adapter_config.json/out")
        self.fails("must not be replaced", *command[:-1], "adapter", "--overwrite")

    @pytest.mark.slow
    @pytest.mark.parametrize("command", [["export", "adapter", "new/out"], ["merge", "base", "adapter", "new/out"]])
    def test_a_disk_that_is_full(self, copied, command):
        result = run_fork(*command, cwd=Path.cwd(), before=LIMITED_FILE_SIZE)
        assert result.returncode == 1, result.stderr
        (line,) = complaints(result)
        assert "File too large" in line
        assert sorted(path.name for path in Path().iterdir()) == ["adapter", "base"]

    @pytest.mark.parametrize("command", [["export", "adapter", "out"], ["merge", "base", "adapter", "out"]])
    def test_out_that_cannot_be_made(self, copied, command, monkeypatch):
        def mkdir(path: Path, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(Path, "mkdir", mkdir)
        self.fails(f"wara-peft: Permission denied: {str(Path('out').resolve())!r}", *command)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["export", "base", "out"], "'base' is the directory of a model, not of an adapter"),
            (["export", "lora", "out"], "its peft_type is 'LORA'. `PeftModel.from_pretrained` loads it as it is."),
            (["export", "out", "adapter"], "There is no adapter directory 'out'"),
            (["export", "adapter/adapter_config.json", "out"], "it is a file; name the directory that it lies in"),
            (["export", "named", "out"], "Adapters lie in 'named/other': name one of these."),
            (["merge", "adapter", "base", "out"], "'adapter' is an adapter, and 'base' a model. Give the base model"),
            (["merge", "lora", "base", "out"], "'lora' is an adapter, and 'base' a model. Give the base model first"),
            (["merge", "base", "base", "out"], "'base' is the directory of a model, not of an adapter"),
            (["merge", "adapter", "adapter", "out"], "It is the directory of an adapter, not of a model."),
            (["merge", "base", "lora", "out"], "not of a WaRA adapter: its peft_type is 'LORA'"),
            (["merge", "base/config.json", "adapter", "out"], "it is a file; name the directory that it lies in"),
            (["compress", "adapter", "out", "--budget", "0.5"], "It is the directory of an adapter, not of a model."),
            (["compress", "0.5", "base", "--budget", "out"], "There is no model directory '0.5'."),
            (["inspect", "lora"], "its peft_type is 'LORA'"),
            (["inspect", "base"], "is a model without factorised layers"),
            (["inspect", "named"], "Adapters lie in 'named/other': name one of these."),
            (["inspect", "adapter", "--plot", "nowhere/plot.png"], "There is no folder 'nowhere' to write 'plot.png'"),
            (["inspect", "adapter", "--plot", "base"], "'base' is a folder; name an image file"),
        ],
    )
    def test_one_thing_in_the_place_of_another(self, copied, arguments, said):
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained("lora")
        get_peft_model(llama(), WaRAConfig(target_modules=["q_proj"]), "other").save_pretrained("named")
        self.fails(said, *arguments)

    def test_a_broken_adapter(self, copied):
        weights = copied / "adapter" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        self.fails("is not a complete safetensors file", "export", "adapter", "out")
        self.fails("is not a complete safetensors file", "merge", "base", "adapter", "out")
        self.fails("is not a complete safetensors file", "inspect", "adapter")

    def test_a_base_that_does_not_fit(self, copied):
        config = json.loads((copied / "base" / "config.json").read_text())
        (copied / "base" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
        self.fails("LlamaForCausalLM has no 'model.layers.1", "merge", "base", "adapter", "out")

    @pytest.mark.slow
    def test_debug_shows_the_traceback(self, tmp_path):
        result = run("export", tmp_path / "nowhere", "lora", "--debug")
        assert result.returncode == 1
        assert "Traceback" in result.stderr
        assert "FileNotFoundError: There is no adapter directory" in result.stderr
