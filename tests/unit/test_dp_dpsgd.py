"""DP-SGD: correct per-example gradients, a bound on every record, the right noise, and refusals by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedvit.clients.local import LocalTrainer
from fedvit.config import HybridConfig, ModelConfig
from fedvit.dp.opacus_gradients import OpacusGradients
from fedvit.errors import ModelError
from fedvit.models.build import build_model
from fedvit.models.layers import Body
from fedvit.models.trainable import apply_trainable, trainable_weights
from fedvit.models.vision import VisionModel
from fedvit.privacy.randomness import SecretStream, output_id
from fedvit.types import FloatArray, TrainTask

# Torch threads that wait for each other on shared cores take ten times as long.
torch.set_num_threads(1)

SECRET = bytes(range(32))
CLIP = 0.7
# Sums come out so large that the rounding of the weights they were added to is nothing.
SCALE = 1000.0
MODELS = [
    ("hybrid_lite0", "all"),
    ("hybrid_lite0", "adapters"),
    ("hybrid_lite0", "head"),
    ("linear path", "head"),
    ("linear path", "all"),
    ("test_vit", "all"),
    ("test_vit2", "all"),
    ("test_vit2", "adapters"),
]


def build(name: str = "hybrid_lite0", trainable: str = "all") -> VisionModel:
    """A model whose every trainable weight matters: fresh heads and adapters of zeros would hide faults."""
    hybrid = HybridConfig(width=16, heads=2, linear_path=name == "linear path")
    name = "hybrid_lite0" if hybrid.linear_path else name
    options = {"pretrained": False, "trainable": trainable, "hybrid": hybrid}
    model = build_model(ModelConfig(name=name, **options), 3, 32)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def records(model: VisionModel, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return model.features(images), torch.arange(count) % 3


def task_for(count: int, **changes: float) -> TrainTask:
    """Without noise, with every record drawn, and the division undone."""
    task = TrainTask("run", 0, "base", "data", 0.0, 1.0, CLIP, 1, SCALE * count)
    return dataclasses.replace(task, **changes)  # type: ignore[arg-type]


def clipped_sum(
    model: VisionModel, features: Tensor, labels: Tensor, trainer: LocalTrainer | None = None
) -> FloatArray:
    trainer = trainer or LocalTrainer(model, physical_batch_size=64)
    delta = trainer.train(task_for(len(labels)), trainable_weights(model), features, labels, SECRET, "car")
    return -flat(delta) / np.float32(SCALE)


def true_clipped_sum(model: VisionModel, features: Tensor, labels: Tensor) -> FloatArray:
    """One example at a time, by torch alone, in float64: in float32 the reference itself would be 2e-5 off."""
    exact = copy.deepcopy(model).double()
    parameters = [p for p in exact.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for feature, label in zip(features.double(), labels, strict=True):
        loss = functional.cross_entropy(exact.body(feature[None]), label[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        total += gradient * min(1.0, CLIP / float(gradient.norm()))
    return total.float().numpy()


def flat(weights: Mapping[str, FloatArray]) -> FloatArray:
    return np.concatenate([values.ravel() for values in weights.values()])


def relative_error(computed: FloatArray, truth: FloatArray) -> float:
    return float(np.linalg.norm(computed - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize(("name", "trainable"), MODELS)
def test_the_clipped_sum_is_that_of_one_example_at_a_time(name: str, trainable: str) -> None:
    model = build(name, trainable)
    features, labels = records(model, 5)
    assert relative_error(clipped_sum(model, features, labels), true_clipped_sum(model, features, labels)) < 1e-5


def test_channels_last_features_give_the_same_sum() -> None:
    model = build("test_vit")
    features, labels = records(model, 3)
    strided = features.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert relative_error(clipped_sum(model, strided, labels), clipped_sum(model, features, labels)) < 1e-6


@pytest.mark.parametrize(("name", "trainable"), [("hybrid_lite0", "all"), ("test_vit", "all")])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(name: str, trainable: str) -> None:
    model = build(name, trainable)
    trainer = LocalTrainer(model, physical_batch_size=64)
    features, labels = records(model, 5)
    whole = clipped_sum(model, features, labels, trainer)
    for gone in range(len(labels)):
        rest = torch.arange(len(labels)) != gone
        moved = np.linalg.norm(whole - clipped_sum(model, features[rest], labels[rest], trainer))
        # These weights give gradients far above the clip norm, so that the bound is reached.
        assert moved == pytest.approx(CLIP, rel=1e-4)
        assert moved <= CLIP * (1 + 1e-5)


def test_opacus_keeps_the_bound_under_bfloat16() -> None:
    model = build("test_vit")
    engine = OpacusGradients(model.body, "body.")
    features, labels = records(model, 5)

    def total(chosen: list[int]) -> Tensor:
        engine.clip(features[chosen], labels[chosen], CLIP)
        return torch.cat([p.grad.double().flatten() for p in engine.parameters.values() if p.grad is not None])

    with torch.autocast("cpu", torch.bfloat16):
        whole = total([0, 1, 2, 3, 4])
        for gone in range(len(labels)):
            moved = float((whole - total([i for i in range(len(labels)) if i != gone])).norm())
            assert CLIP * (1 - 1e-3) <= moved <= CLIP * (1 + 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_record_that_is_not_finite_counts_as_zero(value: float) -> None:
    model = build()
    features, labels = records(model, 4)
    rest = torch.tensor([True, True, False, True])
    expected = clipped_sum(model, features[rest], labels[rest])
    features[2] = value
    assert relative_error(clipped_sum(model, features, labels), expected) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e30, 3e38])
def test_a_record_whose_gradient_norm_overflows_counts_as_zero(value: float) -> None:
    model = small(_Plain())
    features, labels = torch.rand(3, 6, generator=torch.Generator().manual_seed(3)), torch.arange(3)
    expected = clipped_sum(model, features[:2], labels[:2])
    features[2] = value
    assert relative_error(clipped_sum(model, features, labels), expected) < 1e-5


def test_a_batch_of_non_finite_records_is_a_noise_only_step() -> None:
    model = build(trainable="head")
    features, labels = records(model, 2)
    task = task_for(2, noise_multiplier=1.5, learning_rate=2.0)
    trainer, base = LocalTrainer(model, physical_batch_size=1), trainable_weights(model)
    delta = flat(trainer.train(task, base, torch.full_like(features, float("nan")), labels, SECRET, "car"))
    np.testing.assert_allclose(delta, -1.5 * CLIP * noise(task, 2, len(delta), step=0), rtol=1e-4, atol=1e-6)


def noise(task: TrainTask, num_examples: int, size: int, step: int) -> FloatArray:
    context = {"release": output_id(task, "car", num_examples), "step": step}
    return SecretStream(SECRET, "noise", context).normal(size).astype(np.float32)


def test_the_noise_of_a_released_step_has_the_promised_size() -> None:
    model = build()
    features, labels = records(model, 5)
    trainer, base = LocalTrainer(model, physical_batch_size=64), trainable_weights(model)
    changes = {"sampling_prob": 1.0, "learning_rate": 3.0}
    noisy, quiet = (
        flat(trainer.train(task_for(5, noise_multiplier=sigma, **changes), base, features, labels, SECRET, "car"))
        for sigma in (2.0, 0.0)
    )
    scaled = (noisy - quiet).astype(np.float64) / (3.0 * 2.0 * CLIP / (1.0 * 5))
    assert scaled.size > 4000
    assert abs(scaled.mean()) < 4 / np.sqrt(scaled.size)
    assert scaled.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * scaled.size))


@pytest.mark.parametrize("steps", [1, 3])
def test_empty_batches_are_noise_only_steps(steps: int) -> None:
    model = build(trainable="head")
    features, labels = records(model, 4)
    task = task_for(4, noise_multiplier=1.5, sampling_prob=1e-9, learning_rate=4e-9, local_steps=steps)
    delta = flat(
        LocalTrainer(model, physical_batch_size=2).train(
            task, trainable_weights(model), features, labels, SECRET, "car"
        )
    )
    expected = -1.5 * CLIP * sum(noise(task, 4, len(delta), step) for step in range(steps))
    np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5)


def test_the_secret_coins_choose_the_records_and_the_divisor_is_their_expectation() -> None:
    model = build()
    features, labels = records(model, 9)
    task = task_for(9, sampling_prob=0.4, learning_rate=2.0)
    delta = flat(
        LocalTrainer(model, physical_batch_size=4).train(
            task, trainable_weights(model), features, labels, SECRET, "car"
        )
    )
    context = {"release": output_id(task, "car", 9), "step": 0}
    drawn = torch.from_numpy(SecretStream(SECRET, "poisson", context).coins(9, 0.4))
    assert 0 < int(drawn.sum()) < 9
    truth = -2.0 * true_clipped_sum(model, features[drawn], labels[drawn]) / (0.4 * 9)
    assert relative_error(delta, truth) < 1e-5


def small(body: Body, trainable: str = "all") -> VisionModel:
    model = VisionModel(_Pixels(), body, 4, 3)
    apply_trainable(model, trainable, 1)  # type: ignore[arg-type]
    return model


class _Pixels(nn.Module):
    def forward(self, images_u8: Tensor) -> Tensor:
        return images_u8.flatten(1)[:, :6].to(torch.float32) / 255


class _Linear(Body):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def classifier(self) -> nn.Module:
        return self.head


class _Plain(_Linear):
    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)  # type: ignore[no-any-return]


class _MixesExamples(_Linear):
    def forward(self, features: Tensor) -> Tensor:
        return self.head(features - features.mean(dim=0))  # type: ignore[no-any-return]


class _Multiplies(_Linear):
    def forward(self, features: Tensor) -> Tensor:
        return torch.einsum("bd,cd->bc", features, self.head.weight)


class _Unused(_Linear):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)  # type: ignore[no-any-return]


class _Remembers(_Linear):
    def __init__(self) -> None:
        super().__init__()
        self.head.register_buffer("memory", torch.zeros(6))

    def forward(self, features: Tensor) -> Tensor:
        self.head.memory.copy_(features[0].detach())
        return self.head(features)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (_MixesExamples, ["that of body.head.weight is wrong"]),
        (_Multiplies, ["torch.functional.einsum of body.head.weight", "weight got none"]),
        (_Unused, ["body.spare.weight got none"]),
        (_Remembers, ["the buffer head.memory changes", "body.head has both trainable parameters and buffers"]),
    ],
)
def test_what_has_no_true_per_example_gradient_is_refused_by_name(body: type[Body], named: list[str]) -> None:
    with pytest.raises(ModelError) as refused:
        LocalTrainer(small(body()), physical_batch_size=2)
    assert [part for part in named if part not in refused.value.message] == []
