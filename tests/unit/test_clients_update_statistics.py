"""Poisoned clients show in their noised updates: flipped labels by where they pull, scaled ones by how far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedvit.aggregation.update_bounds import MechanismBounds, step_deviation
from fedvit.clients.host import FeatureCache
from fedvit.clients.update_statistics import UpdateStatisticsMonitor
from fedvit.config import FaultConfig, Settings
from fedvit.data.partition import VirtualFleet
from fedvit.drift.quality import concerns_by_client, score_of
from fedvit.models.build import build_model
from fedvit.models.trainable import head_name, trainable_weights
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.settings import load_settings
from fedvit.tools.simulation.clients import SimulatedClients
from fedvit.tools.simulation.faults import Faults
from fedvit.types import ClientOutcome, TrainTask, UpdateStatistics, Weights
from fedvit.updates import ClientUpdate
from fedvit.wire.tensors import weights_digest

torch.set_num_threads(1)
CLIENTS = [f"vehicle-{i:02d}" for i in range(8)]
COLOURS = {"green": (40, 180, 60), "red": (190, 50, 40)}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Eight clients of 20 images each, of two classes that can be history apart."""
    folder, draw = tmp_path_factory.mktemp("statistics"), np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 2)):
        for name, colour in COLOURS.items():
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + draw.normal(0, 30, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    # Noise that is always the same: of other noise, one draw in ten leaves a faulty client in doubt a little longer.
    load_or_create_root_secret(folder / "var", lambda size: bytes(range(size)))
    return load_settings(
        environ={},
        overrides={
            "home": folder / "var",
            "data": {
                "source": "folder",
                "path": folder / "images",
                "image_size": 16,
                "partition": {"scheme": "iid", "clients": len(CLIENTS), "min_examples": 2},
            },
            "model": {
                "pretrained": False,
                "trainable": "head",
                "hybrid": {"depth": 1, "width": 16, "heads": 2, "pooling_bands": 2},
            },
        },
    )


def task_for(base: Weights, round_index: int) -> TrainTask:
    return TrainTask("run-0001", round_index, weights_digest(base), "d" * 64, 1.0, 0.5, 1.0, 1, 2.0)


def bounds_of(task: TrainTask, weights: Weights) -> MechanismBounds:
    return MechanismBounds(task, {name: array.shape for name, array in weights.items()})


@contextmanager
def trained(settings: Settings, fault: FaultConfig | None, rounds: int) -> Iterator[dict[str, UpdateStatistics]]:
    """How the clients' updates looked while they, and those of a faulty group, trained one model by FedAvg."""
    faults = Faults([fault] if fault else [], CLIENTS, seed=1)
    fleet = VirtualFleet.open(settings.data)
    model = build_model(settings.model, 2, settings.data.image_size)
    clients = SimulatedClients(settings, faults, FeatureCache(model, fleet), fleet, model)
    weights: dict[str, Any] = dict(trainable_weights(model))
    head = head_name(model)
    assert head is not None
    monitor = UpdateStatisticsMonitor(head, weights[head])
    outcomes: dict[str, list[ClientOutcome]] = {client_id: [] for client_id in CLIENTS}
    for round_index in range(1, rounds + 1):
        task = task_for(weights, round_index)
        bounds, own = bounds_of(task, weights), {c: clients.answer(task, weights, c) for c in CLIENTS}
        answers = {
            c: monitor.observe(bounds, weights, update) for c, update in own.items() if isinstance(update, ClientUpdate)
        }
        total = sum(answer.total_weight for answer in answers.values())
        for name in weights:
            step = sum(np.asarray(a.weighted_sum[name]) for a in answers.values()) / total
            weights[name] = (weights[name] + step).astype(np.float32)
        for client_id, answer in answers.items():
            outcomes[client_id] += answer.outcomes
    yield {
        client_id: UpdateStatistics(
            tuple(o.update_norm for o in history if o.update_norm is not None),
            {str(i): o.alignment for i, o in enumerate(history) if o.alignment is not None},
        )
        for client_id, history in outcomes.items()
    }


def faulty(fault: FaultConfig) -> set[str]:
    return set(Faults([fault], CLIENTS, seed=1).of)


def test_honest_clients_are_left_alone(settings: Settings) -> None:
    with trained(settings, None, 10) as statistics:
        assert concerns_by_client(statistics, {}, None, None) == {}
        assert all(0 < norm < 1 for of_client in statistics.values() for norm in of_client.norms)
        # In the first round there is no head yet that anything could be held against.
        assert {(len(of_client.norms), len(of_client.alignments)) for of_client in statistics.values()} == {(10, 9)}


def test_flipped_labels_pull_against_what_the_fleet_has_learned(settings: Settings) -> None:
    fault = FaultConfig(share=0.25, kinds=("label_flip",))
    with trained(settings, fault, 20) as statistics:
        concerns = concerns_by_client(statistics, {}, None, None)
        assert {client_id for client_id, of_client in concerns.items() if score_of(of_client) < 0.5} == faulty(fault)
        assert all("contradict" in words for of_client in concerns.values() for words, _ in of_client)


def test_scaled_updates_are_longer_than_training_makes_them(settings: Settings) -> None:
    fault = FaultConfig(share=0.25, kinds=("scale",), factor=10.0)
    with trained(settings, fault, 2) as statistics:
        concerns = concerns_by_client(statistics, {}, None, None)
        assert {client_id for client_id, of_client in concerns.items() if score_of(of_client) == 0.0} == faulty(fault)


def test_noise_alone_has_an_alignment_of_variance_one_and_a_norm_below_the_largest() -> None:
    draw = np.random.default_rng(0)
    initial = np.zeros((3, 200), np.float32)
    base = {"head": draw.normal(size=(3, 200)).astype(np.float32)}
    task, monitor = task_for(base, 1), UpdateStatisticsMonitor("head", initial)
    alignments = []
    for _ in range(400):
        noise = {"head": 20 * step_deviation(task, 20) * draw.normal(size=(3, 200))}
        update = ClientUpdate(1, ClientOutcome("a", 20), noise, 20.0)
        (outcome,) = monitor.observe(bounds_of(task, base), base, update).outcomes
        assert outcome.alignment is not None
        assert outcome.update_norm is not None
        assert 0 < outcome.update_norm < 1
        alignments.append(outcome.alignment)
    assert np.std(alignments) == pytest.approx(1.0, abs=0.15)
    assert np.mean(alignments) == pytest.approx(0.0, abs=0.2)
