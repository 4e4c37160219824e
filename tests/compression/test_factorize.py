"""Whole models factorised: what is replaced, what is left, and that the rest of life goes on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
)

import wara_peft
from tests.references import Chain, Conv1DModel, Mlp
from wara_peft.attention import LowRankMultiheadAttention
from wara_peft.compression import LowRankLinear, factorize, factorize_linear


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def truncate(model: nn.Module, rank: int) -> None:
    """Give every linear layer's weight this rank."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(torch.randn(module.out_features, rank) @ torch.randn(rank, module.in_features) / 8)


TOKENS = {"input_ids": torch.arange(24).view(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.long)}


class TestReplacing:
    def test_every_linear_layer_at_full_rank(self) -> None:
        model = bert()
        expected = model(**TOKENS).logits
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                full = min(module.in_features, module.out_features)
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, factorize_linear(module, full))
        assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == 2 * 6 + 2
        torch.testing.assert_close(model(**TOKENS).logits, expected, rtol=0, atol=1e-5)

    def test_full_rank_saves_nothing_and_changes_nothing(self) -> None:
        model = bert()
        expected = model(**TOKENS).logits
        result = factorize(model, rank=16)
        assert result.replaced == {}
        assert len(result.left) == 2 * 6 + 2
        assert "break-even of (32, 16) is 10.7" in result.left["bert.encoder.layer.0.intermediate.dense"]
        assert torch.equal(model(**TOKENS).logits, expected)

    def test_the_rank_that_the_weights_have_reproduces_the_outputs(self) -> None:
        model = bert()
        truncate(model, 4)
        expected = model(**TOKENS).logits
        result = factorize(model, rank=4)
        assert set(result.replaced.values()) == {4}
        assert len(result.replaced) == 2 * 6 + 1
        assert list(result.left) == ["classifier"]  # (3, 16) would grow
        torch.testing.assert_close(model(**TOKENS).logits, expected, rtol=0, atol=1e-5)

    def test_counts(self) -> None:
        model = bert()
        result = factorize(model, rank=4)
        assert result.parameters_after == sum(parameter.numel() for parameter in model.parameters())
        square, wide = 16 * 16 - 4 * 32, 16 * 32 - 4 * 48
        saved = 2 * (4 * square + 2 * wide) + square  # and the pooler
        assert result.parameters_before - result.parameters_after == saved

    def test_a_fraction_gives_each_layer_its_rank(self) -> None:
        result = factorize(bert(), rank=0.5)
        assert result.replaced["bert.encoder.layer.0.attention.self.query"] == 4  # of 8
        assert result.replaced["bert.encoder.layer.0.output.dense"] == 5  # of 10.67

    @pytest.mark.parametrize(
        ("target_modules", "expected"),
        [
            (
                ["query", "value"],
                {f"bert.encoder.layer.{i}.attention.self.{x}" for i in (0, 1) for x in ("query", "value")},
            ),
            (["layer.1.output.dense"], {"bert.encoder.layer.1.output.dense"}),
            (r".*layer\.0.*key", {"bert.encoder.layer.0.attention.self.key"}),
        ],
    )
    def test_targets(self, target_modules: str | list[str], expected: set[str]) -> None:
        model = bert()
        assert set(factorize(model, 2, target_modules=target_modules).replaced) == expected
        assert {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)} == expected

    def test_conv1d(self) -> None:
        model = Conv1DModel()
        with torch.no_grad():
            model.proj.weight.copy_(torch.randn(9, 2) @ torch.randn(2, 14))
        x = torch.randn(3, 9)
        expected = model(x)
        assert factorize(model, 2).replaced == {"proj": 2}
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)

    def test_a_module_with_two_names_stays_one(self) -> None:
        model = Chain(depth=3)
        model.layers[2] = model.layers[0]
        assert set(factorize(model, 2).replaced) == {"layers.0", "layers.1", "layers.2"}
        assert model.layers[2] is model.layers[0]
        assert isinstance(model.layers[2], LowRankLinear)

    def test_tied_weights_are_left(self) -> None:
        config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        model = GPT2LMHeadModel(config)
        result = factorize(model, 2)
        assert "tied" in result.left["lm_head"]
        assert model.lm_head.weight is model.transformer.wte.weight
        assert "transformer.h.0.attn.c_attn" in result.replaced
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()

    def test_random_draws_new_weights(self) -> None:
        model, other = bert(), bert()
        other.load_state_dict(model.state_dict())
        factorize(model, 4, solver="random")
        factorize(other, 4, solver="random")
        assert not torch.equal(model(**TOKENS).logits, other(**TOKENS).logits)

    def test_models_that_look_at_weights(self) -> None:
        """T5 compares a dtype with that of `wo.weight`."""
        model = T5EncoderModel(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()
        truncate(model, 4)
        expected = model(input_ids=TOKENS["input_ids"]).last_hidden_state
        assert "encoder.block.0.layer.1.DenseReluDense.wo" in factorize(model, 4).replaced
        torch.testing.assert_close(model(input_ids=TOKENS["input_ids"]).last_hidden_state, expected, rtol=0, atol=1e-5)


class TestPyTorchsTransformer:
    def encoder(self) -> nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2)
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if parameter.dim() == 2:
                    for block in parameter.chunk(3) if "in_proj" in name else (parameter,):
                        block.copy_(torch.randn(len(block), 3) @ torch.randn(3, block.shape[1]) / 4)
        return encoder

    @pytest.mark.parametrize("target_modules", [None, ["self_attn"], ["linear1", "linear2"]])
    @pytest.mark.parametrize("training", [True, False])
    def test_reproduces_its_outputs(self, target_modules: list[str] | None, training: bool) -> None:
        encoder, states = self.encoder(), torch.randn(2, 5, 16)
        mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
        expected = encoder(states, src_key_padding_mask=mask)
        result = factorize(encoder, 3, target_modules=target_modules)
        assert len(result.replaced) == 2 * len(target_modules or ["self_attn", "linear1", "linear2"])
        with torch.set_grad_enabled(training):  # in eval mode without gradients PyTorch has paths of its own
            got = encoder.train(training)(states, src_key_padding_mask=mask)
        torch.testing.assert_close(got[~mask], expected[~mask], rtol=0, atol=1e-4)

    def test_only_encoders_whose_attention_is_replaced_lose_nested_tensors(self) -> None:
        model = nn.ModuleDict({"replaced": self.encoder(), "before": self.encoder(), "left": self.encoder()})
        factorize(model, 3, target_modules=r"before\..*self_attn")
        model["before"].use_nested_tensor = True  # the user's choice
        factorize(model, 3, target_modules=r"replaced\.layers\.1\.self_attn|left\..*\.linear1")
        assert [encoder.use_nested_tensor for encoder in model.values()] == [False, True, True]

    def test_attention_is_replaced_as_a_whole(self) -> None:
        encoder = self.encoder()
        result = factorize(encoder, 3)
        assert isinstance(encoder.layers[0].self_attn, LowRankMultiheadAttention)
        assert not [name for name in result.replaced if "out_proj" in name]
        per_layer = 4 * (16 * 16 - 3 * 32) + 2 * (16 * 32 - 3 * 48)
        assert result.parameters_before - result.parameters_after == 2 * per_layer


class TestLife:
    def test_saves_loads_and_trains_under_trainer(self, tmp_path: Path) -> None:
        model = bert()
        factorize(model, 4)
        start = copy.deepcopy(model.state_dict())
        rows = [{"input_ids": TOKENS["input_ids"][i % 3].tolist(), "labels": i % 3} for i in range(24)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=8,
            learning_rate=1e-2,
            per_device_train_batch_size=6,
            report_to="none",
            save_strategy="no",
            logging_strategy="epoch",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.5 * losses[0]
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
        assert {f"bert.encoder.layer.1.output.dense.{part}.weight" for part in ("down", "up")} <= moved

        trainer.save_model(str(tmp_path / "saved"))
        other = bert()
        factorize(other, 4, solver="random")
        other.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
        model.eval()
        assert torch.equal(other(**TOKENS).logits, model(**TOKENS).logits)

    @pytest.mark.parametrize("config", [LoraConfig, wara_peft.WaRAConfig])
    def test_adapters_go_on_the_factors(self, config: type) -> None:
        model = bert()
        factorize(model, 4, target_modules=["dense"])
        expected = model(**TOKENS).logits
        adapted = get_peft_model(model, config(target_modules=["dense.down", "dense.up"], r=1)).eval()
        torch.testing.assert_close(adapted(**TOKENS).logits, expected)
        for name, parameter in adapted.named_parameters():
            if "_B" in name:
                nn.init.normal_(parameter)
        changed = adapted(**TOKENS).logits
        assert (changed - expected).abs().max() > 1e-4
        torch.testing.assert_close(adapted.merge_and_unload()(**TOKENS).logits, changed, rtol=0, atol=1e-5)


def with_nan() -> nn.Module:
    model = Mlp()
    nn.init.constant_(model.down.weight, torch.nan)
    return model


class TestErrors:
    @pytest.mark.parametrize(
        ("model", "arguments", "message"),
        [
            (nn.Linear(8, 8), {}, "model is itself a Linear.*factorize_linear"),
            (Mlp(), {"rank": 0}, "rank=0 must be"),
            (Mlp(), {"rank": 1.5}, "rank=1.5 must be"),
            (Mlp(), {"solver": "nmf"}, "solver='nmf' is unknown"),
            (Mlp(), {"target_modules": ["up", "query"]}, "'query' matches no .* end in down, head, up"),
            (Mlp(), {"target_modules": "q.*"}, r"'q\.\*' matches no"),
            (nn.Sequential(nn.ReLU()), {}, "None matches no .* nothing, as there are none"),
            (with_nan(), {}, "'down' cannot be factorised: .*NaN"),
            (
                get_peft_model(Mlp(), LoraConfig(target_modules=["up"])),
                {},
                r"'base_model\.model\.up' has a PEFT adapter",
            ),
            (nn.Sequential(nn.MultiheadAttention(16, 2)), {}, "'0' cannot be factorised: .*batch_first=False"),
        ],
    )
    def test_nothing_is_changed(self, model: nn.Module, arguments: dict, message: str) -> None:
        modules = dict(model.named_modules())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            factorize(model, **{"rank": 2, **arguments})
        assert dict(model.named_modules()) == modules
        after = model.state_dict()
        assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)
