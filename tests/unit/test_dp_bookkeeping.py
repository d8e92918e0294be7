"""Book-keeping against torch itself, one example at a time: families of models, trainable modes, odd corners."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedvit.config import HybridConfig, ModelConfig
from fedvit.dp.bookkeeping import BookKeeping
from fedvit.dp.dpsgd import per_example_gradients
from fedvit.dp.interceptor import OpInterceptor
from fedvit.dp.recorder import GradientRecorder, Layer
from fedvit.errors import ModelError
from fedvit.models.build import build_model
from fedvit.models.layers import Body
from fedvit.models.timm_vit import TimmBody
from fedvit.models.trainable import TrainableMode, apply_trainable
from fedvit.models.vision import VisionModel

# Torch threads that wait for each other on shared cores take ten times as long.
torch.set_num_threads(1)

CLIP = 0.7
NARROW = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
# timm's architectures, made small.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", NARROW),
    "deit3": ("deit3_small_patch16_224", NARROW),
    "dinov2": ("vit_small_patch14_dinov2", NARROW),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", NARROW),
    "beit": ("beit_base_patch16_224", NARROW),
    "beit, one position bias for all": (
        "beitv2_base_patch16_224",
        {**NARROW, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
    ),
    "eva02": ("eva02_tiny_patch14_224", NARROW),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2},
    ),
    "relative positions": ("vit_relpos_small_patch16_224", NARROW),
}
MODES: list[TrainableMode] = ["all", "head", "biases", "adapters"]


def randomised(body: Body, deviation: float = 0.1) -> Body:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))
    return body


def family(name: str, mode: TrainableMode = "all") -> Body:
    if name == "hybrid":
        config = ModelConfig(
            name="hybrid_lite0", pretrained=False, trainable=mode, hybrid=HybridConfig(width=16, heads=2)
        )
        return randomised(build_model(config, 3, 32).body)
    architecture, options = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model(architecture, img_size=16, num_classes=3, **options)
    model = VisionModel(nn.Identity(), TimmBody(vit), 16, 3)
    apply_trainable(model, mode, 2)
    return randomised(model.body)


def records(name: str = "vit", count: int = 3) -> tuple[Tensor, Tensor]:
    shape = (40, 4, 4) if name == "hybrid" else (3, 16, 16)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(6)), torch.arange(count) % 3


def clipped(engine: BookKeeping, features: Tensor, labels: Tensor, clip: float = CLIP) -> Tensor:
    engine.clip(features, labels, clip)
    return torch.cat([p.grad.flatten() for p in engine.parameters.values() if p.grad is not None])


def truth(body: Body, features: Tensor, labels: Tensor, clip: float = CLIP) -> tuple[Tensor, Tensor]:
    """The clipped sum and the norms, by torch alone in float64; the bound is kept as Opacus keeps it."""
    exact = copy.deepcopy(body).double().eval()
    parameters = [p for p in exact.parameters() if p.requires_grad]
    total, norms = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64), []
    for feature, label in zip(features.double(), labels, strict=True):
        loss = functional.cross_entropy(exact(feature[None]), label[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        norms.append(gradient.norm())
        total += gradient * min(1.0, clip / (float(norms[-1]) + 1e-6))
    return total, torch.stack(norms)


def error(computed: Tensor, true: Tensor) -> float:
    return float((computed.double() - true).norm() / true.norm())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*FAMILIES, "hybrid"])
def test_every_family_in_every_mode_is_one_example_at_a_time(name: str, mode: TrainableMode) -> None:
    body, (features, labels) = family(name, mode), records(name)
    engine = BookKeeping(body, "body.")
    total, norms = truth(body, features, labels)
    assert error(clipped(engine, features, labels), total) < 1e-5
    assert error(engine.norms(features, labels), norms) < 1e-5


@pytest.mark.parametrize("name", [*FAMILIES, "hybrid"])
def test_in_double_precision_nothing_is_left_of_the_difference(name: str) -> None:
    body, (features, labels) = family(name).double(), records(name)
    total, norms = truth(body, features, labels)
    assert error(clipped(BookKeeping(body, "body."), features.double(), labels), total) < 1e-10
    assert error(BookKeeping(body, "body.").norms(features.double(), labels), norms) < 1e-10


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_channels_last_pictures_give_the_same_sum(name: str) -> None:
    engine, (features, labels) = BookKeeping(family(name), "body."), records(name)
    strided = features.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert error(clipped(engine, strided, labels), clipped(engine, features, labels).double()) < 1e-6


@pytest.mark.parametrize("size", [1, 3, 7])
def test_micro_batches_add_up(size: int) -> None:
    engine, (features, labels) = BookKeeping(family("swin"), "body."), records(count=7)
    parts = zip(features.split(size), labels.split(size), strict=True)
    total = torch.stack([clipped(engine, *part) for part in parts]).sum(dim=0)
    assert error(total, clipped(engine, features, labels).double()) < 1e-6


def test_an_empty_batch_is_a_sum_of_zeros() -> None:
    engine, (features, labels) = BookKeeping(family("vit"), "body."), records()
    total = clipped(engine, features[:0], labels[:0])
    assert len(total) == sum(p.numel() for p in engine.parameters.values())
    assert not total.any()


def test_a_non_finite_example_counts_as_zero_and_is_counted() -> None:
    engine, (features, labels) = BookKeeping(family("vit"), "body."), records(count=4)
    expected = clipped(engine, features[:3], labels[:3])
    assert engine.num_not_finite == 0
    features[3] = float("nan")
    assert error(clipped(engine, features, labels), expected.double()) < 1e-6
    assert engine.num_not_finite == 1


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_batch_of_non_finite_examples_is_a_sum_of_zeros(name: str) -> None:
    engine, (features, labels) = BookKeeping(family(name), "body."), records(count=2)
    total = clipped(engine, torch.full_like(features, float("nan")), labels)
    assert len(total) == sum(p.numel() for p in engine.parameters.values())
    assert not total.any()
    assert engine.num_not_finite == 2


def test_in_bfloat16_the_norm_is_that_of_the_very_gradient_that_is_added() -> None:
    engine, (features, labels) = BookKeeping(family("vit"), "body."), records()
    exact = clipped(engine, features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        # bfloat16 has 8 bits: the gradients themselves are off by that, the bound on them by rounding in float32.
        assert error(clipped(engine, features, labels), exact.double()) < 0.03
        for index in range(len(labels)):
            one = clipped(engine, features[index : index + 1], labels[index : index + 1], 0.01)
            assert one.dtype == torch.float32
            assert float(one.norm()) == pytest.approx(0.01, rel=1e-3)
            assert float(one.norm()) <= 0.01 * (1 + 1e-5)


class _Odd(Body):
    """A small body of pictures [B, 3, 16, 16] around one odd layer on tokens [B, 4, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(192, 8)
        self.head = nn.Linear(8, 3)
        self.build()

    def build(self) -> None: ...

    def odd(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.odd(self.embed(images.reshape(-1, 4, 192))).mean(dim=1))
        return logits


class _TiedWeights(_Odd):
    def build(self) -> None:
        self.tied = nn.Linear(8, 8)

    def odd(self, tokens: Tensor) -> Tensor:
        return self.tied(self.tied(tokens).tanh())  # type: ignore[no-any-return]


class _TiedBias(_Odd):
    def build(self) -> None:
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.bias = self.first.bias

    def odd(self, tokens: Tensor) -> Tensor:
        return self.second(self.first(tokens).tanh())  # type: ignore[no-any-return]


class _WeightAsVector(_Odd):
    """A linear layer's weight that is also added: the two norms cannot be added."""

    def build(self) -> None:
        self.linear = nn.Linear(8, 4)

    def odd(self, tokens: Tensor) -> Tensor:
        return tokens * self.linear(tokens).sum(dim=2, keepdim=True) + self.linear.weight


class _WideThenNarrow(_Odd):
    """No activation between them: the first one's outputs are the second one's inputs."""

    def build(self) -> None:
        self.wide, self.narrow = nn.Linear(8, 64), nn.Linear(64, 8)

    def odd(self, tokens: Tensor) -> Tensor:
        return self.narrow(self.wide(tokens))  # type: ignore[no-any-return]


class _StandardisedWeight(_Odd):
    def build(self) -> None:
        self.weight = nn.Parameter(torch.eye(8) + 0.1 * torch.arange(8.0))

    def odd(self, tokens: Tensor) -> Tensor:
        return functional.linear(tokens, self.weight / self.weight.norm(), self.weight.sum(dim=0))


class _Convolution(_Odd):
    def build(self) -> None:
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.rms = nn.RMSNorm(8)

    def odd(self, tokens: Tensor) -> Tensor:
        images = self.norm(self.conv(tokens.mT.reshape(-1, 8, 2, 2)))
        return self.rms(images.flatten(2).mT)  # type: ignore[no-any-return]


class _Scalar(_Odd):
    def build(self) -> None:
        self.scale = nn.Parameter(torch.tensor(1.5))

    def odd(self, tokens: Tensor) -> Tensor:
        return self.scale * tokens / (1.0 + self.scale)


class _BatchInTheMiddle(_Odd):
    """The examples are in the second dimension, which is not supported."""

    def build(self) -> None:
        self.table = nn.Parameter(torch.ones(1, 1, 8))

    def odd(self, tokens: Tensor) -> Tensor:
        return (tokens.transpose(0, 1) * self.table).transpose(0, 1)


@pytest.mark.parametrize(
    "build", [_TiedWeights, _TiedBias, _WeightAsVector, _WideThenNarrow, _StandardisedWeight, _Convolution, _Scalar]
)
def test_odd_uses_of_a_parameter_are_right(build: Callable[[], Body]) -> None:
    body, (features, labels) = randomised(build()), records(count=4)
    total, norms = truth(body, features, labels)
    engine = BookKeeping(body, "body.")
    assert error(clipped(engine, features, labels), total) < 1e-5
    assert error(engine.norms(features, labels), norms) < 1e-5


def test_examples_that_are_not_in_front_are_refused() -> None:
    with pytest.raises(ModelError) as refused:
        clipped(BookKeeping(_BatchInTheMiddle(), "body."), *records(count=3))
    assert "mul of body.table" in refused.value.message
    # Two pictures divide four tokens: only the comparison with torch shows it, and Opacus is used.
    assert per_example_gradients(_BatchInTheMiddle(), "body.", records(count=2)[0]).engine == "Opacus"


class _NotIntercepted(_Odd):
    """A parameter is applied to data while torch functions are disabled, so that it cannot be intercepted."""

    def odd(self, tokens: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return tokens * self.embed.bias


def test_an_operation_that_was_not_intercepted_is_refused_in_the_same_pass() -> None:
    engine = BookKeeping(_NotIntercepted(), "body.")
    with pytest.raises(ModelError) as refused:
        clipped(engine, *records())
    assert "body.embed.bias" in refused.value.message
    assert all(parameter.grad is None for parameter in engine.parameters.values())


class _ByKeyword(_Odd):
    def odd(self, tokens: Tensor) -> Tensor:
        return torch.mul(tokens, other=self.embed.bias)


def test_a_call_of_an_unknown_form_is_refused_by_name() -> None:
    with pytest.raises(ModelError) as refused:
        clipped(BookKeeping(_ByKeyword(), "body."), *records())
    assert "mul of body.embed.bias" in refused.value.message


class _SomeTokens(Body):
    """Each example's loss uses one token of eight, not the same one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 5), nn.Linear(5, 3)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.second(self.first(features.reshape(-1, 8, 96)[:, :, :48]).tanh())
        return torch.stack(
            [each[2 + int(chooses)] for each, chooses in zip(tokens, features[:, 0, 0, 0] > 0, strict=True)]
        )

    def classifier(self) -> nn.Module:
        return self.second


class _ObservedRecorder(GradientRecorder):
    def __init__(self, parameters: dict[str, nn.Parameter], batch: int) -> None:
        super().__init__(parameters, batch)
        self.shapes: set[tuple[int, ...]] = set()

    def add_linear(self, layer: Layer, inputs: Tensor | None, outputs: Tensor) -> None:
        self.shapes.add(tuple(outputs.shape[:2]))
        super().add_linear(layer, inputs, outputs)


def test_tokens_that_no_loss_uses_are_left_out_of_products_and_of_nothing_else() -> None:
    engine, (features, labels) = BookKeeping(_SomeTokens(), ""), records()
    recorder = _ObservedRecorder(engine.parameters, len(labels))
    interceptor = OpInterceptor(engine.parameters, recorder)
    data = interceptor.begin(features)
    with interceptor:
        logits = engine.module(data)
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert recorder.shapes == {(3, 2)}
    sums, norms = truth(engine.module, features, labels)
    assert error(clipped(engine, features, labels), sums) < 1e-5
    assert error(engine.norms(features, labels), norms) < 1e-5


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 3e38])
def test_an_examples_norm_does_not_depend_on_its_batch(number: float) -> None:
    engine, (features, labels) = BookKeeping(_SomeTokens(), ""), records()
    # A token that no loss uses; yet zero times a non-finite value is not zero.
    features[1].view(8, 96)[5, 0] = number
    in_batch = engine.norms(features, labels)
    alone = torch.cat([engine.norms(features[i : i + 1], labels[i : i + 1]) for i in range(3)])
    assert not in_batch[1].isfinite()
    torch.testing.assert_close(in_batch, alone, equal_nan=True)


class _OnlyOpacus(_Odd):
    def build(self) -> None:
        self.conv = nn.Conv1d(8, 8, 1)

    def odd(self, tokens: Tensor) -> Tensor:
        return self.conv(tokens.mT).mT  # type: ignore[no-any-return]


def test_opacus_is_used_where_book_keeping_is_not_possible() -> None:
    features, labels = records()
    assert per_example_gradients(family("vit"), "body.", features).engine == "Book-keeping"
    body = randomised(_OnlyOpacus())
    engine = per_example_gradients(body, "body.", features)
    assert engine.engine == "Opacus"
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            engine.parameters["body." + name].copy_(parameter)
    engine.clip(features, labels, CLIP)
    total = torch.cat([p.grad.flatten() for p in engine.parameters.values() if p.grad is not None])
    assert error(total, truth(body, features, labels)[0]) < 1e-5


def test_a_step_leaves_nothing_behind_for_the_garbage_collector() -> None:
    engine, (features, labels) = BookKeeping(family("swin"), "body."), records()
    gc.collect()
    gc.disable()
    try:
        engine.clip(features, labels, CLIP)
        assert not [thing for thing in gc.get_objects() if isinstance(thing, GradientRecorder)]
    finally:
        gc.enable()


def test_biases_keep_no_activations() -> None:
    model = VisionModel(nn.Identity(), _TiedWeights(), 16, 3)
    apply_trainable(model, "biases", 2)
    model.body.classifier().requires_grad_(False)
    features, labels = records()
    stored: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        BookKeeping(model.body, "body.").clip(features, labels, CLIP)
    assert stored
    assert features.untyped_storage().data_ptr() not in stored


def test_the_callers_features_are_left_as_they_were() -> None:
    engine, (features, labels) = BookKeeping(_WideThenNarrow(), "body."), records()
    before = features.clone()
    engine.clip(features, labels, CLIP)
    assert torch.equal(features, before)
