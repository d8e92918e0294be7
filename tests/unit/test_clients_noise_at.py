"""Client hosts by the place of the noise: what leaves them, and with which noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.clients.host import vision_host
from fedvit.clients.workload import WorkloadHost
from fedvit.config import Settings
from fedvit.privacy.mechanism import sensitivity
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.secagg.noise import decode
from fedvit.secagg.task_plan import plan_of, unflat
from fedvit.settings import load_settings
from fedvit.types import Encoding, TrainTask, Weights
from fedvit.updates import PartialSum, RingSum
from tests.unit.test_clients_host import CLIENTS, base_of, task_for
from tests.unit.test_clients_host import settings as settings  # the fixture
from tests.unit.test_workload import V
from tests.unit.test_workload import base_of as workload_weights
from tests.unit.test_workload import settings as workload_settings
from tests.unit.test_workload import task_for as workload_task


def at(settings: Settings, unit: str, place: str) -> Settings:
    """The settings with this unit and this place of the noise; the secret of the state folder is a known one."""
    load_or_create_root_secret(settings.home, lambda size: bytes(range(size)))
    privacy = settings.privacy.model_copy(update={"privacy_unit": unit, "noise_at": place})
    secure = settings.secure_aggregation.model_copy(update={"masks": False})
    return settings.model_copy(update={"privacy": privacy, "secure_aggregation": secure})


def task_at(base: Weights, unit: str, place: str) -> TrainTask:
    # Every record is drawn: coins depend on the task, and the place of the noise is a part of it.
    task = replace(task_for(base), privacy_unit=unit, noise_at=place, sampling_prob=1.0, l2_clip_norm=0.5)
    return replace(task, participants=3, sum_weight=18.0) if place == "distributed" else task


@pytest.mark.parametrize("unit", ["record", "client"])
def test_integers_of_a_host_are_the_sum_without_noise_and_shares_of_it(settings: Settings, unit: str) -> None:
    base = base_of(settings)
    plain = vision_host(at(settings, unit, "server")).train(task_at(base, unit, "server"), base, CLIENTS)
    host, task = vision_host(at(settings, unit, "distributed")), task_at(base, unit, "distributed")
    message = host.train(task, base, [*CLIENTS, "vehicle-99"])
    assert isinstance(plain, PartialSum)
    assert isinstance(message, RingSum)
    assert message.total_weight == plain.total_weight == (18.0 if unit == "record" else 3.0)
    assert [outcome.error is None for outcome in message.outcomes] == [True, True, True, False]
    plan = plan_of(task, at(settings, unit, "distributed"), sum(array.size for array in base.values()))
    decoded = unflat(decode(plan, message.vector), base)
    error = np.concatenate([(decoded[name] - plain.weighted_sum[name]).ravel() for name in base])
    # At least the noise that is charged, of three clients where two would be enough; the model is small.
    assert error.std() == pytest.approx((1.5**0.5) * task.noise_multiplier * sensitivity(task), rel=0.4)
    again = vision_host(at(settings, unit, "distributed")).train(task, base, [*CLIENTS, "vehicle-99"])
    assert isinstance(again, RingSum)
    np.testing.assert_array_equal(again.vector, message.vector)
    other = host.train(replace(task, attempt=1), base, CLIENTS)
    assert isinstance(other, RingSum)
    assert np.mean(other.vector != message.vector) > 0.9


def test_one_contribution_is_the_summand_of_its_client(settings: Settings) -> None:
    base = base_of(settings)
    host, task = vision_host(at(settings, "record", "distributed")), task_at(base, "record", "distributed")
    alone = [host.contribution(task, base, client_id) for client_id in CLIENTS]
    together = host.train(task, base, CLIENTS)
    assert isinstance(together, RingSum)
    bits = plan_of(task, at(settings, "record", "distributed"), sum(a.size for a in base.values())).bits
    vectors = [own.vector for own in alone if isinstance(own, RingSum)]
    np.testing.assert_array_equal(sum(vectors) & np.uint32(2**bits - 1), together.vector)


def test_a_client_that_trusts_nobody_adds_all_the_noise_to_its_clipped_update(settings: Settings) -> None:
    base = base_of(settings)
    clipped = vision_host(at(settings, "client", "server")).train(task_at(base, "client", "server"), base, CLIENTS[:1])
    host, task = vision_host(at(settings, "client", "client")), task_at(base, "client", "client")
    noised = host.train(task, base, CLIENTS[:1])
    assert isinstance(clipped, PartialSum)
    assert isinstance(noised, PartialSum)
    error = np.concatenate([(noised.weighted_sum[n] - clipped.weighted_sum[n]).ravel() for n in base])
    assert error.std() == pytest.approx(0.5, rel=0.4)
    assert noised.within_clip == 0, "whether an update was clipped has no noise"
    encoded = host.train_encoded(task, base, CLIENTS[0], Encoding.FLOAT32)
    assert encoded.content


@pytest.mark.parametrize("place", ["client", "distributed"])
def test_a_workload_s_clients_add_noise_where_the_settings_say(tmp_path: Path, place: str) -> None:
    capped = {"cohort": {"selection": "all", "max_participations": 3}}
    load_or_create_root_secret(tmp_path, lambda size: bytes(range(size)))
    config = workload_settings(tmp_path)
    overrides: dict[str, Any] = {
        "home": tmp_path,
        "workload": {"clients_class": config.workload.clients_class},
        "training": capped,
        "privacy": {"privacy_unit": "client", "noise_multiplier": 4.0},
    }
    messages = []
    for noise_at in ("server", place):
        overrides["privacy"]["noise_at"] = noise_at
        one = load_settings(environ={}, overrides=overrides)
        base = workload_weights(one)
        task = workload_task(base, privacy_unit="client", l2_clip_norm=1e-3, noise_at=noise_at, participants=2)
        messages.append(WorkloadHost(one).train(task, base, V[:2]))
    plain, noised = messages
    assert isinstance(plain, PartialSum)
    if isinstance(noised, RingSum):
        plan = plan_of(task, one, sum(array.size for array in base.values()))
        sums = unflat(decode(plan, noised.vector), base)
    else:
        assert isinstance(noised, PartialSum)
        sums = dict(noised.weighted_sum)
    error = max(float(np.abs(sums[name] - plain.weighted_sum[name]).max()) for name in base)
    assert noised.total_weight == plain.total_weight == 2.0
    assert 0 < error < 8 * 1e-3 * 2**0.5 * 6
