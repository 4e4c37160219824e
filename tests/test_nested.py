"""Nested adapters: the first k components of one training, against dense float64 algebra, the SVD and PEFT's LoRA."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tests.references import Mlp
from wara_peft import (
    RankShrinking,
    WaRAConfig,
    frozen_factors,
    lora_view,
    rank_penalty,
    save_as_lora,
    shrink_ranks,
    to_lora,
)
from wara_peft.forms import importance_order, turns_of
from wara_peft.layers.lookup import layers_of
from wara_peft.nested import cut_ranks
from wara_peft.wavelet import subbands


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.conv(self.words(tokens).transpose(1, 2)).transpose(1, 2))


TOKENS = torch.arange(10).view(2, 5)


def nested(**fields) -> PeftModel:
    torch.manual_seed(0)
    fields = {"target_modules": ["words", "conv", "out"], "r": 2, "init_weights": False, **fields}
    return get_peft_model(Net(), WaRAConfig(ordered_dropout=True, **fields)).double().eval()


def with_zeros_after(model: PeftModel, rank: int) -> PeftModel:
    """A copy whose later components are zero, by the order written out: of each subband the first, the second, …"""
    model = copy.deepcopy(model)
    turns = model.peft_config["default"].component_order
    for layer in layers_of(model, "default").values():
        columns = layer.wara_B["default"]
        in_order = [(index, band) for index in range(9) for band in turns if index < columns.ranks.get(band, 0)]
        for index, band in in_order[rank:]:
            columns.subband(band).data[:, index] = 0
    return model


class TestOrder:
    def test_subbands_take_turns_from_coarse_to_fine(self):
        turns = turns_of(subbands(2))
        assert turns == ["aa0", "aa2", "dd2", "ad2", "da2", "dd1", "ad1", "da1"]
        # Rows: aa2 0-1, ad2 2, dd1 3-5, aa0 6.
        assert importance_order({"aa2": 2, "ad2": 1, "dd1": 3, "aa0": 1}, turns) == [6, 0, 2, 3, 1, 4, 5]

    def test_it_is_in_the_config_and_comes_back(self, tmp_path: Path):
        order = ["dd1", "aa1", "ad1", "da1", "aa0"]
        model = nested(component_order=order)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Net(), tmp_path)
        assert loaded.peft_config["default"].component_order == order
        assert loaded.base_model.model.out.wara_A["default"].order == (6, 0, 2, 4, 7, 1, 3, 5)
        assert WaRAConfig(ordered_dropout=True).component_order == ["aa0", "aa1", "dd1", "ad1", "da1"]


class TestFirstComponents:
    @pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA", "ignore:levels=2 is more than is useful")
    @pytest.mark.parametrize("fields", [{}, {"levels": 2, "wavelet": "db2", "subband_ranks": {"aa0": 1}}])
    @pytest.mark.parametrize("rank", [1, 3, 100])
    def test_set_rank_and_exports_are_the_adapter_with_the_later_ones_zero(self, fields, rank, tmp_path: Path):
        model = nested(**fields)
        whole, expected = model(TOKENS), with_zeros_after(model, rank)(TOKENS)
        model.save_pretrained(tmp_path / "wara")
        model.set_rank("default", rank)
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-12, atol=1e-12)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(TOKENS), expected, rtol=1e-12, atol=1e-12)
        model.set_rank("default", None)
        torch.testing.assert_close(model(TOKENS), whole, rtol=1e-12, atol=1e-12)

        for source in (model, tmp_path / "wara"):
            save_as_lora(tmp_path / "lora", source, prefix=rank)
            torch.manual_seed(0)
            lora = PeftModel.from_pretrained(Net().double(), tmp_path / "lora", autocast_adapter_dtype=False)
            assert lora.peft_config["default"].r <= rank
            torch.testing.assert_close(lora(TOKENS), expected, rtol=1e-12, atol=1e-12)

    def test_saving_saves_all(self, tmp_path: Path):
        model = nested()
        whole = model(TOKENS)
        model.set_rank("default", 1)
        assert not torch.allclose(model(TOKENS), whole)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(Net().double(), tmp_path, autocast_adapter_dtype=False)
        torch.testing.assert_close(loaded(TOKENS), whole, rtol=1e-12, atol=1e-12)

    def test_in_an_open_frozen_scope(self):
        model = nested()
        expected = with_zeros_after(model, 2)(TOKENS)
        with torch.no_grad(), frozen_factors(model):
            model(TOKENS)
            model.set_rank("default", 2)
            torch.testing.assert_close(model(TOKENS), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.filterwarnings("ignore:PEFT loads all of this LoRA")
    def test_in_a_view_that_is_refreshed(self):
        model = nested()
        view = lora_view(model)
        model.set_rank("default", 3)
        view.refresh()
        _, expected = to_lora(model)
        for key, value in view.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)


class TestDraw:
    def test_a_training_forward_keeps_a_prefix_and_the_mean_is_the_formula(self):
        """Over uniform b the mean of the truncated products is Σ_i (R − i + 1)/R of the i-th component."""
        model = nested(target_modules=["out"])
        layer = layers_of(model, "default")["out"]
        rows, columns = layer.wara_A["default"], layer.wara_B["default"]()
        rank = rows.rank
        full, order = rows().detach(), list(rows.order)
        model.train()
        seen = [rows() for _ in range(4000)]
        kept = [[bool(row.any()) for row in factor[order]] for factor in seen]
        assert all(flags == sorted(flags, reverse=True) and flags[0] for flags in kept)
        assert {sum(flags) for flags in kept} == set(range(1, rank + 1))
        weights = torch.empty(rank, dtype=torch.float64)
        weights[order] = torch.arange(rank, 0, -1, dtype=torch.float64) / rank
        expected = columns @ (weights[:, None] * full)
        mean = columns @ torch.stack(seen).mean(0)
        torch.testing.assert_close(mean, expected, atol=0.03 * float(expected.norm()), rtol=0)
        model.eval()
        assert torch.equal(rows(), full)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_what_checkpointing_computes_again_has_the_same_draw(self, reentrant):
        model = nested(target_modules=["out"]).train()
        layer = model.base_model.model.out
        rows, columns = layer.wara_A["default"], layer.wara_B["default"]
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        kept = set()
        for seed in range(8):
            found = []
            for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=reentrant)):
                torch.manual_seed(seed)
                model.zero_grad()
                result = run()
                result.square().sum().backward()
                found.append([result, rows.level1.grad.clone(), columns.level1.grad.clone()])
            for plain, again in zip(*found, strict=True):
                torch.testing.assert_close(plain, again, rtol=1e-12, atol=1e-12)
            kept.add(int(rows.level1.grad.any(1).sum()))
        assert len(kept) > 1

    def test_without_it_nothing_is_drawn(self):
        torch.manual_seed(0)
        model = get_peft_model(Net(), WaRAConfig(target_modules=["out"], init_weights=False)).train()
        assert torch.equal(model(TOKENS), model(TOKENS))


class TestLinearCase:
    """ΔW x for white x: the theory says that ordered dropout finds the singular value decomposition, in order."""

    def errors(self, ordered: bool) -> list[float]:
        """For k = 1 … 4 the error of the first k components, over that of the best approximation of rank k."""
        torch.manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0] for _ in range(2))
        values = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
        target = left[:, :4] @ values.diag() @ right[:4]
        base = nn.Sequential(nn.Linear(12, 12, bias=False)).double()
        base[0].weight.data.zero_()
        ranks = {"aa0": 4, "aa1": 0, "ad1": 0, "da1": 0, "dd1": 0}
        model = get_peft_model(
            base,
            WaRAConfig(target_modules=["0"], subband_ranks=ranks, ordered_dropout=ordered),
            autocast_adapter_dtype=False,
        )
        layer = layers_of(model, "default")["0"]
        for parameter in layer.parameters():
            parameter.data = parameter.data.double()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=3e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 3000)
        model.train()
        for _ in range(3000):
            # White inputs: the mean loss is ‖ΔW − target‖².
            (layer(torch.eye(12, dtype=torch.float64)).T - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        rows, columns = (factor().detach() for factor in layer.eval().factors("default"))
        best = [float(values[k:].norm()) for k in range(5)]
        return [float((columns[:, :k] @ rows[:k] - target).norm()) / best[k] for k in (1, 2, 3)]

    def test_each_prefix_is_nearly_the_best_of_its_rank(self):
        assert max(self.errors(ordered=True)) < 1.05
        assert max(self.errors(ordered=False)) > 1.3


class TestPenalty:
    def test_it_is_the_formula(self):
        model = nested(rank_penalty=0.25, levels=2, target_modules=["conv", "out"])
        total = 0.0
        turns = model.peft_config["default"].component_order
        for layer in layers_of(model, "default").values():
            a, b = layer.factors("default")
            in_order = [(i, band) for i in range(2) for band in turns if i < a.ranks.get(band, 0)]
            for first in range(len(in_order)):
                tail = in_order[first:]
                total += torch.cat([a.subband(band)[i].flatten() for i, band in tail]).norm()
                total += torch.cat([b.subband(band)[:, i] for i, band in tail]).norm()
        torch.testing.assert_close(rank_penalty(model), 0.25 * total, rtol=1e-6, atol=0)

    def test_its_gradient_is_finite_where_a_tail_is_zero(self):
        model = nested(rank_penalty=1.0, init_weights=True, target_modules=["out"])
        rank_penalty(model).backward()
        for name, parameter in model.named_parameters():
            if "wara_B" in name:
                assert torch.isfinite(parameter.grad).all() and not parameter.any()

    def test_the_model_adds_it_to_its_loss_in_training_alone(self):
        model = get_peft_model(llama(), WaRAConfig(ordered_dropout=True, rank_penalty=0.1, r=2))
        tokens = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None]}
        model.eval()
        plain = model(**tokens).loss
        model.train()  # B is zero, so that nothing else differs
        torch.testing.assert_close(model(**tokens).loss, plain + rank_penalty(model))
        model.disable_adapter_layers()
        base = model.merge_and_unload()
        torch.testing.assert_close(base.train()(**tokens).loss, plain)
        assert not base._forward_hooks

    def test_micro_batches_add_up_to_one_penalty(self):
        model = get_peft_model(llama(), WaRAConfig(ordered_dropout=True, rank_penalty=0.1, r=2)).eval()
        tokens = torch.arange(12).view(2, 6)
        labels = tokens.clone()
        labels[0, :3] = -100
        plain = model(input_ids=tokens, labels=labels).loss
        model.train()
        items = (labels[:, 1:] != -100).sum()
        parts = [
            model(input_ids=tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in (0, 1)
        ]
        torch.testing.assert_close(sum(parts), plain + rank_penalty(model))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, num_hidden_layers=1, **sizes))


class TestShrinking:
    def test_the_longest_prefix_that_is_worth_it_stays_and_does_not_come_back(self):
        model = nested(target_modules=["out"], rank_penalty=0.1).train()
        layer = model.base_model.model.out
        a, b = layer.factors("default")
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            (model(TOKENS).square().mean() + rank_penalty(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
        rows, columns = a.level1[list(a.order)], b.level1[:, list(a.order)]
        worth = [float(rows[i:].norm() * columns[:, i:].norm()) for i in range(8)]
        threshold = (worth[4] + worth[5]) / 2
        assert shrink_ranks(model, threshold, optimizer=optimizer) == {"out": 5}
        for _ in range(3):
            (model(TOKENS).square().mean() + rank_penalty(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert b.level1[:, list(a.order)].any(0).tolist() == [True] * 5 + [False] * 3
        assert a.level1[list(a.order)].any(1).tolist() == [True] * 5 + [False] * 3
        model.eval()
        expected = model(TOKENS)
        cut_ranks(model)
        assert layer.total_rank("default") == 5
        torch.testing.assert_close(model(TOKENS), expected, rtol=1e-12, atol=1e-12)

    def test_trainer(self, tmp_path: Path):
        """Six of each layer's eight components are far from zero; the other two are zero and have no gradient."""
        model = get_peft_model(llama(), WaRAConfig(ordered_dropout=True, rank_penalty=1e-2, r=2))
        with torch.no_grad():
            for layer in layers_of(model, "default").values():
                a, b = layer.factors("default")
                for tensor, dim in ((a.level1, 0), (b.level1, 1)):
                    tensor.normal_().index_fill_(dim, torch.tensor(a.order[6:]), 0)
        arguments = TrainingArguments(
            tmp_path, num_train_epochs=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no",
        )  # fmt: skip
        rows = [{"input_ids": torch.randint(12, (6,)), "labels": torch.randint(12, (6,))} for _ in range(32)]
        run = Trainer(model, arguments, train_dataset=rows, callbacks=[RankShrinking(threshold=0.02)])
        run.train()
        ranks = [layer.total_rank("default") for layer in layers_of(model, "default").values()]
        assert ranks == [6, 6]
        run.save_model(tmp_path / "final")
        assert to_lora(tmp_path / "final")[0].r == max(ranks)


class TestBadInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"ordered_dropout": True, "form": "tiny"}, "only with 'subband'"),
            ({"rank_penalty": 0.1}, "no meaning without ordered_dropout"),
            ({"component_order": ["aa1"]}, "no meaning without ordered_dropout"),
            ({"ordered_dropout": True, "component_order": ["aa1", "dd1"]}, "must name each subband once"),
            ({"ordered_dropout": True, "rank_penalty": -1.0}, "rank_penalty=-1.0 must be at least 0"),
            ({"ordered_dropout": True, "rank_penalty": float("nan")}, "must be finite"),
        ],
    )
    def test_config(self, fields, message):
        with pytest.raises(ValueError, match=message):
            WaRAConfig(**fields)

    def test_what_has_no_order_and_ranks_out_of_range(self, tmp_path: Path):
        plain = get_peft_model(Mlp(8, 8), WaRAConfig(target_modules="all-linear"))
        for refused in (
            lambda: plain.set_rank("default", 2),
            lambda: rank_penalty(plain),
            lambda: shrink_ranks(plain, 0.1),
            lambda: to_lora(plain, prefix=2),
        ):
            with pytest.raises(ValueError, match="was trained without ordered_dropout=True"):
                refused()
        model = nested()
        for rank in (0, -3):
            with pytest.raises(ValueError, match=f"rank={rank} must be at least 1"):
                model.set_rank("default", rank)
        with pytest.raises(ValueError, match="prefix=0 must be at least 1"):
            to_lora(model, prefix=0)
        with pytest.raises(ValueError, match="not both"):
            save_as_lora(tmp_path / "lora", model, 2, prefix=2)
        assert not (tmp_path / "lora").exists()
        model.merge_adapter()
        with pytest.raises(ValueError, match="is merged into module"):
            model.set_rank("default", 2)
        with pytest.raises(ValueError, match="threshold=-1 must be at least 0"):
            shrink_ranks(model, -1)
