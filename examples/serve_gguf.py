"""Serve the quickstart's adapter by llama.cpp, and compare its answers with those of transformers.

    python examples/quickstart.py
    pip install xllamacpp
    python examples/serve_gguf.py              # the base model as it comes, with weights of 4 bits
    python examples/serve_gguf.py --float32    # the same weights in float32

The adapter becomes a GGUF file. One llama.cpp server has the base model and the adapter, and answers each message with
the adapter scaled by 0, which is the base model, and by 1. The server's prompt cache is off, as llama.cpp would use
what it computed with one adapter for a request with another (ggml-org/llama.cpp#26207). Beside quantized weights
llama.cpp rounds activations as well, so that some answers differ from those of transformers; with --float32 both
compute the same.
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported

import gguf
import smollm2
from chat_pairs import answers, prompt_and_answer
from message_data import Pair, language_name, load_messages
from peft import PeftModel
from study_options import stop
from transformers import PreTrainedTokenizerBase

import wara_peft

TOKENS = 40
"""The longest answer, in both."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--output-dir",
        type=Path,
        default=Path("quickstart_output"),
        help="folder in which quickstart.py left an adapter of SmolLM2 (default: %(default)s)",
    )
    add("--language", default="de", help="that the adapter was trained for (default: %(default)s)")
    add(
        "--float32",
        action="store_true",
        help="write the base model's weights in float32 into --output-dir (half a gigabyte), and serve them",
    )
    add("--messages", type=int, default=8, help="held-out messages to translate (default: %(default)s)")
    args = parser.parse_args()
    if args.messages < 1:
        stop(f"--messages {args.messages} must be at least 1")
    if not (args.output_dir / "adapter" / "adapter_config.json").exists():
        stop(f"--output-dir {args.output_dir} has no adapter; run quickstart.py first")
    return args


def write_in_float32(path: Path, quantized: Path) -> None:
    """Write a copy of a GGUF file whose weights are stored as they are computed with, in float32."""
    reader = gguf.GGUFReader(quantized)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            of_items = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], of_items)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start_server(base: Path, adapter: Path) -> Any:
    """Return a server of llama.cpp with the base and the adapter, in this process."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(base)
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 512, 1, 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.verbosity = 1
    return xllamacpp.Server(parameters)


def served(server: Any, tokenizer: PreTrainedTokenizerBase, message: str, language: str, scale: float) -> str:
    """Return llama.cpp's answer, of the likeliest tokens, with the adapter multiplied by `scale`."""
    prompt, _ = prompt_and_answer(tokenizer, Pair(message, ""), language)
    answer = server.handle_completions(
        {
            "prompt": tokenizer(prompt, add_special_tokens=False)["input_ids"],
            "max_tokens": TOKENS,
            "temperature": 0,
            "lora": [{"id": 0, "scale": scale}],
            "cache_prompt": False,
        }
    )
    return " ".join(answer["choices"][0]["text"].split())


def main() -> None:
    args = parse_arguments()
    if find_spec("xllamacpp") is None:
        stop("xllamacpp, a wheel of llama.cpp, is not installed; `pip install xllamacpp` brings it")
    try:
        pairs, language = load_messages(args.language).test[: args.messages], language_name(args.language)
        tokenizer, source = smollm2.load_tokenizer(), smollm2.place(smollm2.NAME)
        base = Path(source["pretrained_model_name_or_path"], source["gguf_file"])
        adapter = args.output_dir / "wara.gguf"
        wara_peft.save_as_lora(adapter, args.output_dir / "adapter", format="gguf", base=base)
    except (RuntimeError, ValueError) as error:
        stop(str(error))
    print(f"Exported {adapter}, {adapter.stat().st_size / 1e6:.1f} MB")
    if args.float32:
        write_in_float32(args.output_dir / "base.gguf", base)
        base = args.output_dir / "base.gguf"

    messages = [pair.source for pair in pairs]
    server = start_server(base, adapter)
    model = PeftModel.from_pretrained(smollm2.load_model(), str(args.output_dir / "adapter"))
    found = {
        ("adapter", "transformers"): answers(model, tokenizer, messages, language),
        ("adapter", "llama.cpp"): [served(server, tokenizer, message, language, 1.0) for message in messages],
        ("base", "llama.cpp"): [served(server, tokenizer, message, language, 0.0) for message in messages],
    }
    with model.disable_adapter():
        found["base", "transformers"] = answers(model, tokenizer, messages, language)

    for index, pair in enumerate(pairs):
        print(f"\n  message                {pair.source}\n  wanted                 {pair.target}")
        for (weights, engine), texts in sorted(found.items()):
            print(f"  {weights + ', ' + engine:23}{texts[index]}")
    print()
    for weights in ("base", "adapter"):
        both = zip(found[weights, "transformers"], found[weights, "llama.cpp"], strict=True)
        print(f"With the {weights}, {sum(a == b for a, b in both)} of {len(messages)} answers are the same in both")
    answered = zip(found["base", "llama.cpp"], found["adapter", "llama.cpp"], strict=True)
    print(f"In llama.cpp the adapter changes {sum(a != b for a, b in answered)} of {len(messages)} answers")


if __name__ == "__main__":
    main()
