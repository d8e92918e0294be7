"""A hostile aggregator against a vehicle: differencing, averaging, and random sequences of tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_server import CLASSES, CLIENT, SPEC, HostileServer, Offered, error_of, settings_with, write_images
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import run_state_machine_as_test

from edge_runtime.training.policy import VehiclePolicy
from edge_runtime.training.vehicle import Vehicle
from fedvit.models.build import build_model
from fedvit.models.trainable import trainable_weights
from fedvit.privacy.accountant import epsilon_of
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.wire.updates import decode_update
from tests.attack.hostile_sequences import DRAWS, HostileSequence, tiny_model, tiny_trainer
from tests.attack.table import AttackTable

SUBJECT = "vehicle"
QUIET = {"privacy": {"noise_multiplier": 20.0}}
"""Noise so large that forty outputs fit into the budget."""


class Target:
    """A vehicle with eight images, its server, and what the server has."""

    def __init__(self, folder: Path) -> None:
        self.server, self.home = HostileServer(), folder / "home"
        self.vehicle = Vehicle(self.server.client(), CLIENT, write_images(folder / "images", 4), self.home)

    def outputs(self, tasks: list[Offered]) -> list[bytes]:
        """The updates that the server gets for these tasks, one after another."""
        for task in tasks:
            self.server.task = task
            self.vehicle.poll()
        return [content for _, content in self.server.updates if error_of(content) is None]

    def histograms(self, requests: list[Offered]) -> list[tuple[int, ...]]:
        """The histograms that the server gets for these requests, one after another."""
        self.server.task = None
        for request in requests:
            self.server.histogram = request
            self.vehicle.poll()
        return [counts for _, counts in self.server.histograms]

    def epsilon(self) -> float:
        """Epsilon of what is on the vehicle's ledger."""
        with Store.open(self.home) as store:
            charges = [entry.charge for entry in store.ledger.entries()]
        return epsilon_of(charges, load_settings(environ={}))

    def lines(self) -> int:
        """The number of charges on the vehicle's ledger."""
        with Store.open(self.home) as store:
            return len(store.ledger.entries())


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    torch.set_num_threads(1)
    result = Target(tmp_path)
    yield result
    result.vehicle.close()


def noise_of(content: bytes) -> Any:
    """The values of an update, [N]; clipped to almost nothing, it consists of noise."""
    model = build_model(settings_with().model, len(CLASSES), 32)
    shapes = {name: array.shape for name, array in trainable_weights(model).items()}
    sums = decode_update(content, max_bytes=10**7, shapes=shapes).weighted_sum
    return np.concatenate([sums[name].ravel() for name in sorted(sums)])


VARIANTS: list[dict[str, Any]] = [
    {},
    *({"model": {"seed": seed}} for seed in range(1, 5)),
    *({"model": {"hybrid": {"depth": depth, "width": 16, "heads": 2}}} for depth in (2, 3)),
    {"training": {"aggregation": "fedprox", "aggregation_options": {"proximal_mu": 1.0}}},
    {"training": {"compression": {"encodings": ["top_k"], "top_k_fraction": 0.5}}},
]


def test_two_models_do_not_give_a_difference_without_noise(target: Target, attack_table: AttackTable) -> None:
    """The same task under several models: before, their noise was equal and cancelled in the difference."""
    quiet = {"privacy": {**QUIET["privacy"], "l2_clip_norm": 1e-6}}
    one_round = [target.server.offer(settings_with(**{**quiet, **variant})) for variant in VARIANTS]
    assert len(target.outputs(one_round)) == target.lines() == 1
    rounds = [
        target.server.offer(settings_with(**{**quiet, **variant}), round_index=n)
        for n, variant in enumerate(VARIANTS, start=2)
    ]
    contents = target.outputs(rounds)
    assert len(contents) == len(set(contents)) == target.lines() == 1 + len(VARIANTS)
    noises = [noise_of(content) for content in contents]
    sizes = [np.linalg.norm(noise) for noise in noises]
    # Independent noises differ by sqrt(2) of their size; equal ones by nothing.
    closest = min(
        float(np.linalg.norm(one - other) / np.mean(sizes)) for i, one in enumerate(noises) for other in noises[:i]
    )
    assert closest > 1.0
    attack_table.add(
        SUBJECT,
        f"one task under {len(VARIANTS)} models and rules, then one a round: difference of two outputs",
        achieved=f"1 output for the round; over rounds, differences of {closest:.2f} times the noise, each charged",
        bound="1 output a round; differences above 1 time the noise",
    )


def test_image_sizes_are_no_way_to_average_the_noise_away(
    target: Target, attack_table: AttackTable, full: bool
) -> None:
    """Many image sizes: before, each gave an output with noise of its own for one charge."""
    count = 24 if full else 6
    sizes = [settings_with(**QUIET, data={"image_size": 32 + 8 * n}) for n in range(count)]
    contents = target.outputs([target.server.offer(settings) for settings in sizes])
    assert len(contents) == target.lines() == 1
    contents = target.outputs([target.server.offer(each, round_index=2 + n) for n, each in enumerate(sizes)])
    assert len(contents) == target.lines() <= 1 + count
    epsilon = target.epsilon()
    assert epsilon <= VehiclePolicy().max_epsilon
    attack_table.add(
        SUBJECT,
        f"{count} image sizes for one round, then one a round",
        achieved=f"1 output for the round; {len(contents)} in all, {target.lines()} charges, epsilon {epsilon:.2f}",
        bound="1 output a round; a charge for each; epsilon at most 8",
    )


def test_sixty_histogram_requests_cost_sixty_charges_or_give_one(target: Target, attack_table: AttackTable) -> None:
    """60 requests for one round, and under other models: before, they cost one charge together."""
    settings = settings_with(**QUIET)
    target.outputs([target.server.offer(settings)])
    specs = [type(SPEC)({"brightness": (2.0 * n + 1.0,)}, len(CLASSES)) for n in range(60)]
    one_round = [target.server.offer_histogram(settings, spec=spec) for spec in specs]
    sizes = [settings_with(**QUIET, data={"image_size": 32 + 8 * n}) for n in range(1, 25)]
    other_models = [target.server.offer_histogram(each, round_index=2) for each in sizes]
    assert len(target.histograms(one_round + other_models)) == 1
    assert target.lines() == 2
    rounds = [
        target.server.offer_histogram(settings, spec=spec, round_index=2 + n, noise_multiplier=20.0)
        for n, spec in enumerate(specs)
    ]
    released = len(target.histograms(rounds))
    assert target.lines() == 1 + released
    epsilon = target.epsilon()
    assert epsilon <= VehiclePolicy().max_epsilon
    attack_table.add(
        SUBJECT,
        "60 histogram requests for one round, 24 for other models, then 60 over rounds",
        achieved=f"1 for the round; {released} in all, {target.lines() - 1} charges, epsilon {epsilon:.2f}",
        bound="1 a round; a charge for each; epsilon at most 8",
    )


@pytest.mark.timeout(7200)
def test_random_sequences_of_tasks_never_get_more_than_the_ledger_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attack_table: AttackTable, full: bool
) -> None:
    """Hypothesis: tasks, histograms, lies, repetitions, garbage, restarts, changed images, in any order."""
    torch.set_num_threads(1)
    monkeypatch.setattr("edge_runtime.training.run_trainer.build_model", tiny_model)
    monkeypatch.setattr("fedvit.clients.host.LocalTrainer", tiny_trainer)
    DRAWS.record(monkeypatch)
    HostileSequence.disks = [write_images(tmp_path / str(i), count, seed=i) for i, count in enumerate((4, 4, 5))]
    wanted = 10_000 if full else 30
    run_state_machine_as_test(
        HostileSequence,
        settings=hypothesis_settings(
            max_examples=wanted,
            stateful_step_count=8,
            deadline=None,
            database=None,
            derandomize=not full,
            suppress_health_check=list(HealthCheck),
        ),
    )
    figures = HostileSequence.figures
    assert figures.sequences >= wanted
    assert figures.outputs > figures.sequences / 2
    assert figures.refusals > 0
    attack_table.add(
        SUBJECT,
        f"{figures.sequences} random sequences with {figures.tasks} tasks; {figures.refusals} refusals",
        achieved=f"{figures.outputs} outputs, none with noise or coins of another; of the epsilon on the vehicle's "
        f"ledger, the server's view implies at most {100 * figures.largest_share:.1f}%",
        bound="no noise for two outputs; at most 100%",
    )
