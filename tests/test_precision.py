"""Dtypes, autocast, gradient checkpointing, torch.compile and frozen factors on a causal model, beside LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from wara_peft import WaRAConfig, frozen_factors

TOKENS = torch.arange(1, 25).view(4, 6)
METHODS = {
    "wara": lambda: WaRAConfig(target_modules="all-linear", wavelet="db2", init_weights=False),
    "wara-shared": lambda: WaRAConfig(target_modules="all-linear", form="shared", init_weights=False),
    "lora": lambda: LoraConfig(target_modules="all-linear", r=16, lora_alpha=16, init_lora_weights=False),
}

each_method = pytest.mark.parametrize("method", METHODS)


def llama(dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, vocab_size=50
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def build(method: str, dtype: torch.dtype = torch.float32, layers: int = 2, **kwargs) -> PeftModel:
    base = llama(dtype, layers)
    torch.manual_seed(1)
    return get_peft_model(base, METHODS[method](), **kwargs)


def loss_and_gradients(model: PeftModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def adapter_dtypes(model: PeftModel) -> set[torch.dtype]:
    return {p.dtype for name, p in model.named_parameters() if "wara_" in name or "lora_" in name}


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestShortBases:
    def test_adapters_are_float32_unless_asked_otherwise(self, method, dtype):
        assert adapter_dtypes(build(method, dtype)) == {torch.float32}
        assert adapter_dtypes(build(method, dtype, autocast_adapter_dtype=False)) == {dtype}

    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_training_is_near_that_in_float32(self, method, dtype, autocast_adapter_dtype):
        exact = build(method)
        model = build(method, dtype, autocast_adapter_dtype=autocast_adapter_dtype)
        loss, gradients = loss_and_gradients(model)
        expected, expected_gradients = loss_and_gradients(exact)
        torch.testing.assert_close(loss.float(), expected, atol=0.05, rtol=0)
        for found, reference in zip(gradients, expected_gradients, strict=True):
            assert (found.float() - reference).norm() <= 0.15 * reference.norm()

    def test_saved_adapters_load_in_both_dtypes(self, method, dtype, tmp_path):
        model = build(method, dtype).eval()
        model.save_pretrained(tmp_path)
        for flag, expected in ((True, torch.float32), (False, dtype)):
            loaded = PeftModel.from_pretrained(llama(dtype), tmp_path, autocast_adapter_dtype=flag)
            assert adapter_dtypes(loaded) == {expected}
            if flag:
                assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@each_method
def test_autocast(method):
    model = build(method)
    expected = model(TOKENS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model)
        logits = model(TOKENS).logits
    assert loss.isfinite()
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.05)


@each_method
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(method, use_reentrant):
    model = build(method).train()
    expected, expected_gradients = loss_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(gradients, expected_gradients)


@each_method
def test_low_cpu_mem_usage(method, tmp_path):
    model = build(method).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    loaded.set_adapter("other")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.slow
@each_method
def test_compiled_training_and_inference_do_not_recompile(method):
    # One block of the model: the second would be traced as the first one was.
    model = build(method, layers=1).train()
    expected, expected_gradients = loss_and_gradients(model)
    logits = model(TOKENS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # as many graphs, compiled faster
    loss, gradients = loss_and_gradients(compiled)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        compiled.eval()(TOKENS)
    with torch.compiler.set_stance("fail_on_recompile"):
        with torch.no_grad():
            torch.testing.assert_close(compiled(TOKENS).logits, logits, atol=1e-5, rtol=1e-4)
        compiled.train()
        loss, _ = loss_and_gradients(compiled)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


class TestAutocastRoundsNothingThatItWouldNotRoundAnyway:
    def test_a_new_adapter_on_an_embedding_changes_nothing(self):
        base = llama()
        model = get_peft_model(copy.deepcopy(base), WaRAConfig(target_modules=["embed_tokens"])).eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(TOKENS).logits, base.eval()(TOKENS).logits)

    def test_merging_is_as_exact_as_outside(self):
        inside, outside = build("wara"), build("wara")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside.merge_adapter()
        outside.merge_adapter()
        for found, expected in zip(inside.parameters(), outside.parameters(), strict=True):
            assert torch.equal(found, expected)


class TestFrozenFactors:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_forward_and_generate_are_the_same(self, mode):
        model = build("wara").eval()
        with torch.no_grad():
            expected = model(TOKENS).logits
        generate = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 4}
        generated = model.generate(**generate, do_sample=False)
        with mode(), frozen_factors(model):
            for _ in range(2):
                assert torch.equal(model(TOKENS).logits, expected)
        with frozen_factors(model):
            assert torch.equal(model.generate(**generate, do_sample=False), generated)
            with pytest.raises(RuntimeError, match="asks for gradients"):
                model(TOKENS)

    def test_adapters_may_be_switched_and_models_copied_inside(self):
        model = build("wara").eval()
        model.add_adapter("other", METHODS["wara-shared"]())
        with torch.no_grad():
            first = model(TOKENS).logits
            model.set_adapter("other")
            second = model(TOKENS).logits
            with frozen_factors(model):
                assert torch.equal(model(TOKENS).logits, second)
                model.set_adapter("default")
                assert torch.equal(model(TOKENS).logits, first)
                copied = copy.deepcopy(model)
                for name, parameter in copied.named_parameters():
                    if "wara_B" in name:
                        parameter.zero_()
                with copied.disable_adapter():
                    base = copied(TOKENS).logits
                torch.testing.assert_close(copied(TOKENS).logits, base)
                assert torch.equal(model(TOKENS).logits, first)

    def test_changes_between_scopes_are_seen(self):
        model = build("wara").eval()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

        def frozen_logits() -> torch.Tensor:
            with torch.no_grad(), frozen_factors(model):
                return model(TOKENS).logits

        def changed() -> bool:
            with torch.no_grad():
                current = model(TOKENS).logits
            found = frozen_logits()
            assert torch.equal(found, current)
            return not torch.equal(found, before)

        before = frozen_logits()
        assert not changed()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        assert changed()
        before = frozen_logits()
        next(p for name, p in model.named_parameters() if "wara_B" in name).data.zero_()
        assert changed()


def test_adapters_of_different_dtypes_on_one_layer():
    model = build("wara").eval()
    model.add_adapter("short", METHODS["wara-shared"](), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if ".short." in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.base_model.set_adapter(["default", "short"])
    found = model(TOKENS).logits
    for name, parameter in model.named_parameters():
        if ".short." in name:
            parameter.data = parameter.data.float()
    expected = model(TOKENS).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
