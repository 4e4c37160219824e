"""Which layers of models are taken: heads are not, and unusual layers are left and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.compression.models import TwoLayers
from tests.families.models import DECODER, ENCODER, IMAGES, MOE, SEQ2SEQ, SPEECH
from wara_peft.compression import (
    SVD,
    Activation,
    TrainedRankPruning,
    calibrate,
    compress,
    factorize,
    factorize_linear,
    share_bases,
)
from wara_peft.compression.targets import layer_targets, linear_targets
from wara_peft.factorized.plain_forward import computes_product

QUIET = {"show_progress_bar": False}
LABELS = {"num_labels": 3}
DISTILBERT = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, **LABELS}
XLNET = {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, **LABELS}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, **LABELS}
GPT2 = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, **LABELS}
SWIN = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2, **LABELS}
ROBERTA_HEAD = ["classifier.dense", "classifier.out_proj"]
HEADS = [
    ("bert", "BertForSequenceClassification", ENCODER, ["classifier"]),
    ("bert", "BertForTokenClassification", ENCODER, ["classifier"]),
    ("bert", "BertForQuestionAnswering", ENCODER, ["qa_outputs"]),
    ("bert", "BertForNextSentencePrediction", ENCODER, ["cls.seq_relationship"]),
    ("bert", "BertForPreTraining", ENCODER, ["cls.predictions.decoder", "cls.seq_relationship"]),
    ("bert", "BertModel", ENCODER, []),
    ("roberta", "RobertaForSequenceClassification", ENCODER, ROBERTA_HEAD),
    ("roberta", "RobertaForMaskedLM", ENCODER, ["lm_head.decoder"]),
    ("electra", "ElectraForSequenceClassification", ENCODER, ROBERTA_HEAD),
    ("distilbert", "DistilBertForSequenceClassification", DISTILBERT, ["pre_classifier", "classifier"]),
    ("xlnet", "XLNetForSequenceClassification", XLNET, ["sequence_summary.summary", "logits_proj"]),
    ("llama", "LlamaForCausalLM", DECODER, ["lm_head"]),
    ("llama", "LlamaForSequenceClassification", {**DECODER, **LABELS}, ["score"]),
    ("llama", "LlamaForQuestionAnswering", DECODER, ["qa_outputs"]),
    ("gpt2", "GPT2DoubleHeadsModel", GPT2, ["lm_head", "multiple_choice_head.summary"]),
    ("bart", "BartForConditionalGeneration", SEQ2SEQ, ["lm_head"]),
    (
        "bart",
        "BartForSequenceClassification",
        {**SEQ2SEQ, **LABELS},
        ["classification_head.dense", "classification_head.out_proj"],
    ),
    ("t5", "T5ForSequenceClassification", T5, ["classification_head.dense", "classification_head.out_proj"]),
    ("vit", "ViTForImageClassification", {**IMAGES, **LABELS}, ["classifier"]),
    (
        "deit",
        "DeiTForImageClassificationWithTeacher",
        {**IMAGES, **LABELS},
        ["cls_classifier", "distillation_classifier"],
    ),
    ("swin", "SwinForImageClassification", SWIN, ["classifier"]),
    (
        "yolos",
        "YolosForObjectDetection",
        {**IMAGES, "image_size": [8, 8], **LABELS},
        [f"{head}.layers.{number}" for head in ("class_labels_classifier", "bbox_predictor") for number in range(3)],
    ),
    ("wav2vec2", "Wav2Vec2ForSequenceClassification", {**SPEECH, **LABELS}, ["projector", "classifier"]),
    ("wav2vec2", "Wav2Vec2ForCTC", SPEECH, ["lm_head"]),
]


def made(kind: str, class_name: str, fields: dict) -> PreTrainedModel:
    with torch.device("meta"):
        return getattr(transformers, class_name)(AutoConfig.for_model(kind, **fields))


@pytest.mark.parametrize(("kind", "class_name", "fields", "head"), HEADS, ids=[row[1] for row in HEADS])
def test_all_but_the_head(kind: str, class_name: str, fields: dict, head: list[str]) -> None:
    model = made(kind, class_name, fields)
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, transformers.Conv1D))}
    assert set(head) <= linear and len(linear - set(head)) > 1
    assert linear_targets(model, None).keys() == linear - set(head)
    assert layer_targets(model, None).keys() & linear == linear - set(head)
    if head:  # who names it gets it
        assert linear_targets(model, [head[0]]).keys() == {head[0]}


def test_a_head_keeps_its_weight() -> None:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(AutoConfig.for_model("vit", **{**IMAGES, "num_labels": 12}))
    before = model.classifier.weight.detach().clone()
    report = compress(model, SVD(0.5), **QUIET)
    assert type(model.classifier) is nn.Linear and torch.equal(model.classifier.weight, before)
    assert "classifier" not in {layer.name for layer in report.layers}


class Rewritten(nn.Linear):
    """Computes what its base class computes."""

    def forward(self, x: Tensor) -> Tensor:
        result = x @ self.weight.T
        return result if self.bias is None else result + self.bias


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-30, 30))


class Squared(nn.Linear):
    """Is additive in its weight, and no linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.square().mean(-1, keepdim=True)


class Masked(nn.Linear):
    def __init__(self, n: int, m: int, **options: bool) -> None:
        super().__init__(n, m, **options)
        self.register_buffer("mask", torch.ones(m, n).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Routing(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x).max(-1)


class Asking(nn.Linear):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def with_forward(n: int, m: int) -> nn.Linear:
    layer = nn.Linear(n, m)
    layer.forward = lambda x: torch.zeros(*x.shape[:-1], m)  # type: ignore[method-assign]
    return layer


UNUSUAL = [Doubled, Clamped, Squared, Masked, Routing, Asking, Called, with_forward]


class TestUnusualLayers:
    @pytest.mark.parametrize("make", [nn.Linear, Rewritten])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_usual(self, make: type[nn.Linear], bias: bool, device: str) -> None:
        with torch.device(device):
            layer = make(12, 20, bias=bias)
        before = {name: getattr(layer, name) for name in ("weight", "bias", "in_features", "out_features", "training")}
        assert computes_product(layer)
        assert all(getattr(layer, name) is value for name, value in before.items())

    @pytest.mark.parametrize("make", UNUSUAL)
    def test_unusual(self, make: Callable[[int, int], nn.Linear]) -> None:
        assert not computes_product(make(12, 20))
        with torch.no_grad():  # zeros would hide a factor
            layer = make(12, 20)
            layer.weight.zero_(), layer.bias.zero_()
        assert not computes_product(layer)

    def test_a_rewritten_layer_is_factorised_right(self) -> None:
        torch.manual_seed(0)
        model = TwoLayers().double()
        model.first = Rewritten(12, 20).double()
        weight, bias, x = model.first.weight.detach(), model.first.bias.detach(), torch.randn(5, 12).double()
        compress(model, SVD({"first": 3}), **QUIET)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        expected = x @ ((left[:, :3] * values[:3]) @ right[:3]).T + bias
        torch.testing.assert_close(model.first(x), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("make", [Doubled, lambda n, m: parametrizations.weight_norm(nn.Linear(n, m))])
    def test_is_left_and_named(self, make: Callable[[int, int], nn.Linear]) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(TwoLayers(), make(12, 20), nn.ReLU(), nn.Linear(20, 12))
        unusual = model[1]
        statistics = calibrate(model, [torch.randn(40, 12)], **QUIET)
        assert statistics.keys() == {"0.first", "0.second", "3"}
        report = compress(model, Activation(0.6), statistics, **QUIET)
        assert list(report.left) == ["1"] and model[1] is unusual
        assert {layer.name for layer in report.layers} == {"0.first", "0.second", "3"}
        assert any(layer.rank for layer in report.layers)
        model = nn.Sequential(TwoLayers(), make(12, 20), nn.ReLU(), nn.Linear(20, 12))
        done = factorize(model, 2)
        assert list(done.left) == ["1"] and done.replaced.keys() == {"0.first", "0.second", "3"}

    def test_nothing_is_left_over(self) -> None:
        model = nn.Sequential(Doubled(12, 20), Masked(20, 12))
        for call in (lambda: compress(model, SVD(0.5), **QUIET), lambda: calibrate(model, [torch.ones(1, 12)])):
            with pytest.raises(ValueError, match=r"No layer .*'0': Doubled has a forward of its own.*'1': Masked"):
                call()
        with pytest.raises(ValueError, match=r"cannot share a base.*'0': Doubled has a forward"):
            share_bases(model, [["0"]], 0.5)

    def test_a_convolution_that_computes_its_weight_is_left_by_pruning(self) -> None:
        class Standardized(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

        model = nn.Sequential(nn.Conv2d(1, 4, 3), Standardized(4, 6, 3), nn.Conv2d(6, 6, 3))
        pruning = TrainedRankPruning()
        pruning.start(model)
        assert pruning._targets.keys() == {"2"}

    def test_falcon(self) -> None:
        """All of Falcon's layers are of a subclass that computes what `nn.Linear` does."""
        torch.manual_seed(0)
        fields = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **fields)).eval().double()
        tokens = torch.randint(40, (8, 16))
        targets = linear_targets(model, None)
        assert len(targets) == 4 and all(type(layer) is not nn.Linear for layer in targets.values())
        report = compress(model, Activation(0.6), calibrate(model, [tokens], **QUIET), **QUIET)
        assert not report.left and {layer.name for layer in report.layers} == targets.keys()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model.config).eval().double()
        expected = model(tokens).logits
        for name, layer in linear_targets(model, None).items():
            model.set_submodule(name, factorize_linear(layer, min(layer.weight.shape)))
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-12)

    def test_phimoe(self) -> None:
        torch.manual_seed(0)
        config = AutoConfig.for_model("phimoe", **MOE, num_local_experts=2)
        model = AutoModelForCausalLM.from_config(config).eval()
        tokens = torch.randint(40, (8, 32))
        report = compress(model, Activation(0.6), calibrate(model, [tokens], **QUIET), **QUIET)
        (left,) = report.left
        assert left.endswith(".router") and "PhimoeTopKRouter has a forward" in report.left[left]
        assert type(model.get_submodule(left)).__name__ == "PhimoeTopKRouter"
