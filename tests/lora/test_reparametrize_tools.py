"""WaRA inside LoRA in tools that know LoRA only: they give what they give for plain LoRA with the same factors.

The rows of the compatibility page are run so in tests/test_parity.py. Here are tools that take more to set up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import (
    ArrowConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    VeloraConfig,
    XLoraConfig,
    create_arrow_model,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.diffusion_models import unet
from tests.references import Mlp
from wara_peft import plain_lora, reparametrize_lora
from wara_peft.lora.reparametrized_layers import ReparametrizedLayer

EXACT = {"atol": 1e-10, "rtol": 1e-10}
TOKENS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0, use_cache=False, **sizes)
    return LlamaForCausalLM(config).eval()


def adapted(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """A model whose LoRA is reparametrised, with coefficients as after training."""
    torch.manual_seed(1)
    base = Mlp() if base is None else base
    fields = {"target_modules": ["up", "down"] if isinstance(base, Mlp) else "all-linear"} | fields
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, lora_alpha=12, **fields)).eval()
    reparametrize_lora(model, project=True)
    return model


def plain(model: nn.Module) -> Any:
    """A copy with plain LoRA that has the same factors."""
    twin = copy.deepcopy(model)
    plain_lora(twin)
    return twin


def logits(model: nn.Module, x: Tensor = TOKENS, **options: Any) -> Tensor:
    result = model(x, **options)
    return getattr(result, "logits", result)


def assert_same_gradients(model: nn.Module, twin: nn.Module) -> None:
    """Those of coefficients are the adjoint of the gradient of plain LoRA's weight; all others are equal."""
    expected = {name: value.grad for name, value in twin.named_parameters() if value.grad is not None}
    for name, layer in model.named_modules():
        if isinstance(layer, ReparametrizedLayer):
            gradients = layer.gradients(expected.pop(f"{name}.weight"))
            expected |= {f"{name}.factor.level{level}": g for level, g in enumerate(gradients, start=1)}
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert found.keys() == expected.keys() and any(gradient.any() for gradient in found.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


# Variants and fields

FIELDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora, dropout": {"use_rslora": True, "lora_dropout": 0.3},
    "alora": {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
    "biases": {"lora_bias": True, "bias": "all"},
    "patterns": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "velora": {"velora_config": VeloraConfig(num_groups=4), "target_modules": ["q_proj", "v_proj"]},
    "kasa": {"kasa_config": KasaConfig(), "target_modules": ["q_proj", "v_proj"]},
    "monteclora": {"monteclora_config": MontecloraConfig(), "target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_a_variant_gives_what_it_gives_for_plain_lora(fields):
    model = adapted(llama(), r=8, **fields)
    twin = plain(model)
    torch.testing.assert_close(logits(model), logits(twin), **EXACT)
    for each in (model, twin):
        torch.manual_seed(2)  # of dropout, and of samples
        each.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert_same_gradients(model, twin)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    merges = not fields.keys() & {"alora_invocation_tokens", "lora_bias"}  # PEFT refuses these two
    found = logits(model.eval())
    if merges:
        model.merge_adapter()
        merged = logits(model)
        model.unmerge_adapter()
    plain_lora(model)
    assert not torch.allclose(logits(model), logits(twin.eval()), **EXACT)
    torch.testing.assert_close(logits(model), found, **EXACT)
    if merges:
        model.merge_adapter()
        torch.testing.assert_close(logits(model), merged, **EXACT)


def test_qalora_gives_what_it_gives_for_plain_lora():
    """PEFT has it for GPTQ layers; the variant itself needs none. Its A reads averages of groups of inputs."""
    torch.manual_seed(1)
    model = get_peft_model(Mlp(), LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    layer = model.base_model.model.up
    QALoraLinearVariant.init(layer, "default", LoraConfig(qalora_group_size=2))
    layer.lora_variant["default"] = QALoraLinearVariant()
    reparametrize_lora(model, project=True)
    assert layer.lora_A["default"].weight.shape == (4, 6)
    twin, x = plain(model), torch.randn(5, 12)
    torch.testing.assert_close(model(x), twin(x), **EXACT)
    for each in (model, twin):
        each(x).square().sum().backward()
    assert_same_gradients(model, twin)


# Optimizers

OF_FACTORS: dict[str, Callable[[PeftModel], torch.optim.Optimizer]] = {
    "create_lorafa_optimizer": lambda model: create_lorafa_optimizer(model, r=8, lora_alpha=12, lr=0.01),
    "create_riemannian_optimizer": lambda model: create_riemannian_optimizer(model, torch.optim.SGD, lr=0.01),
}


@pytest.mark.parametrize("name", OF_FACTORS)
@pytest.mark.parametrize("copied", [False, True])
def test_optimizers_that_compute_with_the_factors_are_refused(name, copied):
    model = copy.deepcopy(adapted()) if copied else adapted()
    model.add_adapter("frozen", model.peft_config["default"])
    before = {key: (value.clone(), value.requires_grad) for key, value in model.named_parameters()}
    assert not any(trains for key, (_, trains) in before.items() if ".frozen." in key)
    optimizer = OF_FACTORS[name](model)
    model(torch.randn(5, 12)).sum().backward()
    with pytest.raises(ValueError, match=f"{name} computes with the factors of LoRA, and 'base_model.model.*.lora_"):
        optimizer.step()
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key][0]) and value.requires_grad == before[key][1]
    model.delete_adapter("frozen")  # PEFT's LoRA-FA pairs the parameters of one adapter only
    plain_lora(model)
    model(torch.randn(5, 12)).sum().backward()
    OF_FACTORS[name](model).step()


def test_other_optimizers_and_plain_lora_beside_it_are_let_through():
    model = adapted()
    for make in OF_FACTORS.values():
        other = get_peft_model(Mlp(), LoraConfig(target_modules=["up"], init_lora_weights=False))
        optimizer = make(other)
        other(torch.randn(5, 12)).sum().backward()
        optimizer.step()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert rates[id(value)] == (0.08 if "lora_B" in name else 0.01)
    before = logits(model, torch.ones(1, 12))
    model(torch.randn(5, 12)).sum().backward()
    optimizer.step()
    assert not torch.allclose(logits(model, torch.ones(1, 12)), before)


# Several adapters


def test_weighted_combinations_are_plain_lora():
    model = adapted()
    model.add_weighted_adapter(["default"], [0.5], "halved")
    assert type(model.base_model.model.up.lora_A["halved"]) is nn.Linear
    x = torch.randn(5, 12)
    base, full = logits(model.get_base_model().up.base_layer, x), model.base_model.model.up(x)
    model.set_adapter("halved")
    torch.testing.assert_close(model.base_model.model.up(x) - base, (full - base) / 2, **EXACT)


def test_an_adapter_with_the_config_of_a_reparametrised_one_is_reparametrised_too():
    """As TRL makes its reference. Another config's stays plain."""
    model = adapted()
    model.add_adapter("ref", model.peft_config["default"])
    model.add_adapter("other", LoraConfig(target_modules=["up"]))
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    kinds = {name: type(layer) for name, layer in model.base_model.model.up.lora_A.items()}
    assert kinds["default"] is kinds["ref"] and kinds["other"] is nn.Linear
    x = torch.randn(5, 12)
    expected = logits(model, x)
    model.set_adapter("ref")
    assert torch.equal(logits(model, x), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model, x), expected)
    twin = copy.deepcopy(model)
    plain_lora(twin)
    twin.add_adapter("plain", twin.peft_config["ref"])
    assert not any(isinstance(module, ReparametrizedLayer) for module in twin.modules())


def test_a_copy_gives_way_to_values_outside_of_the_span_unless_it_trains():
    model = adapted()
    model.add_adapter("copy", model.peft_config["default"])
    layer = model.base_model.model.up.lora_A["copy"]
    values = torch.randn(layer.weight.shape)
    layer.weight.data = values
    assert type(layer) is nn.Linear and torch.equal(layer.weight, values)
    down = model.base_model.model.down.lora_A["copy"]
    model.set_adapter("copy")
    with pytest.raises(ValueError, match="cannot become this one"):
        down.weight.data = torch.randn(down.weight.shape)


def saved(tmp_path: Path, count: int = 2) -> list[str]:
    """Directories of adapters that were trained reparametrised."""
    paths = []
    for seed in range(count):
        model = adapted(llama(), target_modules=["q_proj", "v_proj"])
        with torch.no_grad():
            torch.manual_seed(seed)
            for name, parameter in model.named_parameters():
                if ".factor." in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / str(seed))
        paths.append(str(tmp_path / str(seed)))
    return paths


def arrow(paths: list[str]) -> nn.Module:
    return create_arrow_model(llama(), paths, ArrowConfig(top_k=1, rng_seed=0))


def xlora(paths: list[str]) -> nn.Module:
    torch.manual_seed(0)
    adapters = {str(index): path for index, path in enumerate(paths)}
    return get_peft_model(llama(), XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=adapters))


@pytest.mark.parametrize(("mixture", "names"), [(arrow, ["task_0", "task_1"]), (xlora, ["0", "1"])])
@pytest.mark.filterwarnings("ignore")
def test_mixtures_of_adapters_with_reparametrised_ones_among_them(mixture, names, tmp_path):
    paths = saved(tmp_path)
    expected = logits(mixture(paths))
    model = mixture(paths)
    for name in names:
        reparametrize_lora(model, name)
    torch.testing.assert_close(logits(model), expected, **EXACT)
    plain_lora(model)
    torch.testing.assert_close(logits(model), expected, **EXACT)
    assert not torch.allclose(expected, logits(llama()), atol=1e-3)


# diffusers


def pipeline() -> StableDiffusionPipeline:
    names = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    made = StableDiffusionPipeline(
        unet=unet().double(), scheduler=DDIMScheduler(), requires_safety_checker=False, **dict.fromkeys(names)
    )
    return made


LATENTS = {
    "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "timestep": 10,
    "encoder_hidden_states": torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_in"]


@torch.no_grad()
def noise(pipe: StableDiffusionPipeline) -> Tensor:
    return pipe.unet(**LATENTS).sample


@pytest.mark.slow
def test_diffusers_sets_fuses_saves_loads_and_unloads_it(tmp_path):
    pipe = pipeline()
    base = noise(pipe)
    for name in ("one", "two"):
        pipe.unet.add_adapter(LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False), name)
        reparametrize_lora(pipe.unet, name, project=True)
    twin = pipeline()
    twin.unet = plain(pipe.unet)
    assert not any(isinstance(module, ReparametrizedLayer) for module in twin.unet.modules())

    for names, weights in ((["one"], [1.0]), (["two"], [0.5]), (["one", "two"], [0.7, -0.4])):
        for each in (pipe, twin):
            each.set_adapters(names, weights)
        torch.testing.assert_close(noise(pipe), noise(twin), **EXACT)
        assert (noise(pipe) - base).abs().max() > 1e-3
    mixed = noise(pipe)
    pipe.fuse_lora(["unet"])
    torch.testing.assert_close(noise(pipe), mixed, **EXACT)
    pipe.unfuse_lora(["unet"])
    torch.testing.assert_close(noise(pipe), mixed, **EXACT)
    pipe.delete_adapters("two")
    twin.delete_adapters("two")
    torch.testing.assert_close(noise(pipe), noise(twin), **EXACT)
    pipe.set_adapters(["one"], [1.0])

    layers = get_peft_model_state_dict(pipe.unet, adapter_name="one")
    assert set(layers) == set(get_peft_model_state_dict(twin.unet, adapter_name="one"))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers)
    other = pipeline()
    other.load_lora_weights(tmp_path, adapter_name="again")
    other.unet.set_adapter("again")
    scales = {module.scaling["again"] for module in other.unet.modules() if hasattr(module, "scaling")}
    assert scales == {1.0}
    torch.testing.assert_close(noise(other), noise(pipe), **EXACT)
    reparametrize_lora(other.unet, "again")
    torch.testing.assert_close(noise(other), noise(pipe), **EXACT)
    for each in (pipe, other):
        each.unload_lora_weights()
        torch.testing.assert_close(noise(each), base, **EXACT)


# TRL


class Client:
    """In the place of a vLLM server: it has a model of its own, made from what it is sent, and rolls out with it."""

    def __init__(self, **_: Any) -> None:
        self.model = llama().float()
        self.synced: list[dict[str, Tensor]] = []

    def update_named_params(self, metadata: Any, parameters: Any) -> None:
        received = {name: value.detach().clone() for name, value in parameters}
        assert [(name, list(value.shape)) for name, value in received.items()] == [
            (name, shape) for name, _, shape in metadata
        ]
        self.model.load_state_dict(received, strict=True)
        self.synced.append(received)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], n: int, max_tokens: int, **_: Any) -> dict[str, Any]:
        completions, probabilities = [], []
        for prompt in prompts:
            out = self.model.generate(
                torch.tensor([prompt]).repeat(n, 1),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=True,
            )
            chosen = out[:, len(prompt) :]
            scores = self.model(out).logits.log_softmax(-1)[:, len(prompt) - 1 : -1]
            completions += chosen.tolist()
            probabilities += scores.gather(2, chosen[..., None]).tolist()
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": probabilities}

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def init_communicator(self, device: Any) -> None: ...

    def reset_prefix_cache(self) -> None: ...

    def close_communicator(self) -> None: ...


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_each_sync_of_grpo_is_the_model(tmp_path, monkeypatch):
    """TRL merges the adapter, sends all weights under the names of the base model, and unmerges."""
    generation = pytest.importorskip("trl.generation.vllm_generation")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.parity.training import arguments, tokenizer

    monkeypatch.setattr(generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(generation, "VLLMClient", Client, raising=False)
    torch.set_default_dtype(torch.float32)
    settings = arguments(tmp_path, max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, bf16=False)
    settings |= {"num_generations": 4, "max_completion_length": 4, "use_vllm": True, "vllm_mode": "server"}
    trainer = GRPOTrainer(
        llama().float(),
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=GRPOConfig(**settings, beta=0.01, max_grad_norm=0.0),
        train_dataset=Dataset.from_dict({"prompt": ["w3 w4", "w5 w6"] * 4}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    reparametrize_lora(trainer.model)
    client = trainer.vllm_generation.vllm_client
    sync = trainer.vllm_generation.sync_weights

    def checked_sync() -> None:
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        sync()
        trainer.model.eval()
        with torch.no_grad():
            torch.testing.assert_close(
                logits(client.model.eval(), TOKENS), logits(trainer.model), atol=1e-5, rtol=1e-5
            )
        trainer.model.train()
        for name, value in trainer.model.state_dict().items():
            torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-6)

    trainer.vllm_generation.sync_weights = checked_sync
    trainer.train()
    checked_sync()
    assert len(client.synced) >= 3
    first, last = client.synced[0], client.synced[-1]
    assert not torch.allclose(
        first["model.layers.0.self_attn.q_proj.weight"], last["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_each_adapter_only_sync_of_trl_is_the_model(tmp_path):
    """TRL checks the config, and saves the adapter as vLLM loads it."""
    grpo = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    model = adapted(llama(), target_modules=["q_proj", "v_proj", "down_proj"])
    assert grpo.validate_lora_for_vllm_sync(model) is model.peft_config["default"]
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    outputs = []
    for version in range(3):
        grpo.save_lora_adapter(model, accelerator, "default", str(tmp_path / f"policy-v{version}"))
        served = PeftModel.from_pretrained(llama(), tmp_path / f"policy-v{version}")
        assert not any(isinstance(module, ReparametrizedLayer) for module in served.modules())
        torch.testing.assert_close(logits(served), logits(model), **EXACT)
        outputs.append(logits(served))
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
