"""The local step as its caller sees it: repeatable to the bit, indifferent to memory settings, and leaving no trace."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from raises import raises_naming
from torch import Tensor

from fedvit.clients.local import LocalTrainer
from fedvit.config import HybridConfig, ModelConfig
from fedvit.errors import DataError, ModelError
from fedvit.models.build import build_model
from fedvit.models.trainable import load_trainable_weights, trainable_weights
from fedvit.models.vision import VisionModel
from fedvit.types import FloatArray, TrainTask
from fedvit.wire.tensors import weights_digest

# The same bits are promised on one thread only.
torch.set_num_threads(1)

SECRET = bytes(range(32))
TASK = TrainTask("run", 0, "base", "data", 1.2, 0.5, 1.0, 2, 0.5)


@pytest.fixture(scope="module")
def model() -> VisionModel:
    hybrid = HybridConfig(width=16, heads=2)
    model = build_model(ModelConfig(pretrained=False, hybrid=hybrid), 3, 32)
    generator = torch.Generator().manual_seed(1)
    weights = trainable_weights(model)
    noise = {name: torch.randn(values.shape, generator=generator).numpy() for name, values in weights.items()}
    moved = {name: (values + 0.2 * noise[name]).astype(np.float32) for name, values in weights.items()}
    load_trainable_weights(model, moved)
    return model


@pytest.fixture(scope="module")
def records(model: VisionModel) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (12, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return model.features(images), torch.arange(12) % 3


def delta(trainer: LocalTrainer, model: VisionModel, records: tuple[Tensor, Tensor], **changes: Any) -> str:
    return weights_digest(deltas(trainer, model, records, **changes))


def deltas(
    trainer: LocalTrainer, model: VisionModel, records: tuple[Tensor, Tensor], **changes: Any
) -> dict[str, FloatArray]:
    secret, client_id = changes.pop("secret", SECRET), changes.pop("client_id", "car")
    task = dataclasses.replace(TASK, **changes)
    return trainer.train(task, trainable_weights(model), *records, secret, client_id)


def test_the_delta_covers_the_trainable_weights(model: VisionModel, records: tuple[Tensor, Tensor]) -> None:
    update = deltas(LocalTrainer(model, physical_batch_size=4), model, records)
    base = trainable_weights(model)
    assert update.keys() == base.keys()
    assert all(update[name].shape == base[name].shape and update[name].dtype == np.float32 for name in base)
    assert any(values.any() for values in update.values())


def test_a_retry_gives_the_same_bits_on_a_warm_and_on_a_fresh_trainer(
    model: VisionModel, records: tuple[Tensor, Tensor]
) -> None:
    trainer = LocalTrainer(model, physical_batch_size=4)
    first = delta(trainer, model, records)
    delta(trainer, model, (records[0][:5], records[1][:5]), client_id="another")
    torch.manual_seed(99)
    assert delta(trainer, model, records) == first
    assert delta(LocalTrainer(model, physical_batch_size=4), model, records) == first


@pytest.mark.parametrize(
    "change",
    [{"round_index": 1}, {"run_id": "other"}, {"base_digest": "other"}, {"client_id": "bus"}, {"secret": bytes(32)}],
)
def test_any_other_release_draws_other_numbers(
    model: VisionModel, records: tuple[Tensor, Tensor], change: dict[str, Any]
) -> None:
    trainer = LocalTrainer(model, physical_batch_size=16)
    assert delta(trainer, model, records, **change) != delta(trainer, model, records)


@pytest.mark.parametrize("physical_batch_size", [1, 3, 5])
def test_the_physical_batch_size_is_a_matter_of_memory_alone(
    model: VisionModel, records: tuple[Tensor, Tensor], physical_batch_size: int
) -> None:
    whole = deltas(LocalTrainer(model, physical_batch_size=64), model, records)
    parts = deltas(LocalTrainer(model, physical_batch_size=physical_batch_size), model, records)
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_training_leaves_the_model_and_torchs_generator_alone(
    model: VisionModel, records: tuple[Tensor, Tensor]
) -> None:
    weights, state = weights_digest(trainable_weights(model)), torch.get_rng_state()
    deltas(LocalTrainer(model, physical_batch_size=4), model, records)
    assert weights_digest(trainable_weights(model)) == weights
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())


def test_a_client_that_fails_half_way_does_not_harm_the_next(
    model: VisionModel, records: tuple[Tensor, Tensor]
) -> None:
    trainer = LocalTrainer(model, physical_batch_size=4)
    expected = delta(trainer, model, records)
    features, labels = records
    with pytest.raises(IndexError):
        delta(trainer, model, (features, labels + 7), sampling_prob=1.0)
    assert delta(trainer, model, records) == expected


def test_more_steps_go_on_from_where_the_last_one_ended(model: VisionModel, records: tuple[Tensor, Tensor]) -> None:
    trainer = LocalTrainer(model, physical_batch_size=16)
    quiet: dict[str, Any] = {"noise_multiplier": 0.0, "sampling_prob": 1.0}
    once, twice = (deltas(trainer, model, records, local_steps=steps, **quiet) for steps in (1, 2))
    halfway = {name: values + once[name] for name, values in trainable_weights(model).items()}
    task = dataclasses.replace(TASK, local_steps=1, **quiet)
    rest = trainer.train(task, halfway, *records, SECRET, "car")
    for name, values in twice.items():
        np.testing.assert_allclose(once[name] + rest[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_no_records_or_too_few_labels_are_refused(model: VisionModel, records: tuple[Tensor, Tensor]) -> None:
    trainer = LocalTrainer(model, physical_batch_size=4)
    features, labels = records
    with raises_naming(DataError, "car"):
        delta(trainer, model, (features[:0], labels[:0]))
    with raises_naming(DataError, "car", "12", "11"):
        delta(trainer, model, (features, labels[:11]))


def test_weights_of_another_model_are_refused(model: VisionModel, records: tuple[Tensor, Tensor]) -> None:
    trainer = LocalTrainer(model, physical_batch_size=4)
    base = {**trainable_weights(model), "body.head.bias": np.zeros(5, np.float32)}
    with raises_naming(ModelError, "body.head.bias", "[5]"):
        trainer.train(TASK, base, *records, SECRET, "car")


def test_a_physical_batch_of_nothing_is_refused(model: VisionModel) -> None:
    with raises_naming(ValueError, "physical_batch_size"):
        LocalTrainer(model, physical_batch_size=0)


@pytest.mark.parametrize("place", ["server", "distributed"])
def test_where_noise_is_added_later_the_update_is_the_step_without_noise(
    model: VisionModel, records: tuple[Tensor, Tensor], place: str
) -> None:
    trainer = LocalTrainer(model, physical_batch_size=4)
    # Every record is drawn: coins depend on the task, and the place of the noise is a part of it.
    step = {"sampling_prob": 1.0, "local_steps": 1}
    without = deltas(trainer, model, records, noise_multiplier=0.0, **step)
    update = deltas(trainer, model, records, noise_at=place, **step)
    noised = deltas(trainer, model, records, **step)
    for name, values in without.items():
        np.testing.assert_allclose(update[name], values, rtol=1e-4, atol=1e-6)
        assert update[name].dtype == np.float32
    # 12 records, each clipped to 1, over an expected batch of 12.
    length = np.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in update.values()))
    assert 0 < length <= 0.5 * (1 + 1e-6)
    assert any(np.abs(noised[name] - values).max() > 0.01 for name, values in update.items())


def test_a_step_without_noise_that_draws_no_record_changes_nothing(
    model: VisionModel, records: tuple[Tensor, Tensor]
) -> None:
    trainer = LocalTrainer(model, physical_batch_size=4)
    update = deltas(trainer, model, records, noise_at="server", sampling_prob=1e-9, local_steps=1)
    assert not any(values.any() for values in update.values())
