"""Rounds whose noise is distributed over the clients, with the masks left out: sums, charges, attempts, refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.contributions import RingAggregator, RingEncoder, with_own_noise
from fedvit.clients.host import ClientData, ClientHost
from fedvit.config import Settings
from fedvit.errors import ConfigError, ForbiddenError, SecureAggregationError, UpdateRejectedError
from fedvit.privacy import mechanism
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.events import DistributedGaussian
from fedvit.privacy.randomness import derive_secret, output_id
from fedvit.privacy.round_cost import spend_of
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.protection import protection_for
from fedvit.rounds.secure_sums import check_masks
from fedvit.secagg.noise import decode
from fedvit.secagg.task_plan import plan_of
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.tools.report.simulation import NO_MASKS, summary_of, warning_of
from fedvit.tools.report.sweep import best_yaml
from fedvit.tools.simulation.run import Simulated, simulate
from fedvit.tools.sweep.space import TrialPlan
from fedvit.types import ClientOutcome, Encoding, RunStatus, TrainTask, Weights
from fedvit.updates import ClientAnswer, ClientFailures, ClientUpdate, RingSum, UpdateMessage
from tests.toy_world import ToyWorld
from tests.unit.test_rounds_noise_at import task_of

ROOT = bytes(range(32))


def settings_of(
    home: Path, unit: str = "client", place: str = "distributed", rounds: int = 2, **overrides: Any
) -> Settings:
    privacy = {"privacy_unit": unit, "noise_at": place, "noise_multiplier": 2.0, "l2_clip_norm": 0.5}
    cohort = {"selection": "all", "max_participations": 9} if unit == "client" else {}
    return load_settings(
        environ={},
        overrides={
            "home": home,
            "training": {"rounds": rounds, "learning_rate": 0.5, "cohort": cohort},
            "privacy": {"sampling_prob": 0.25, "target_epsilon": 500.0, **privacy},
            "secure_aggregation": {"masks": False, **overrides},
            "histograms": {"every_rounds": None},
            "release": {"every_rounds": 10},
        },
    )


class NoData:
    def load(self, client_id: str) -> ClientData:
        raise AssertionError("nothing is to be trained")


class NoTraining:
    def train(self, *_: Any) -> Weights:
        raise AssertionError("nothing is to be trained")


class RingFleet(FakeFleet):
    """Clients that add noise themselves, all of it or a share in integers."""

    def __init__(self, settings: Settings, target: Any, **options: Any) -> None:
        super().__init__(target, **options)
        self._settings = settings
        self.alter: Callable[[RingSum], RingSum] = lambda message: message

    def _one(self, task: TrainTask, client_id: str, step: Any) -> ClientAnswer:
        own = super()._one(task, client_id, step)
        if task.noise_place != "client" or not isinstance(own, ClientUpdate):
            return own
        return with_own_noise(task, own, derive_secret(ROOT, client_id))

    def train_group(self, task: TrainTask, weights: Weights, client_ids: tuple[str, ...]) -> UpdateMessage:
        if task.noise_place != "distributed":
            return super().train_group(task, weights, client_ids)
        step = (self._target - weights["point"]).astype(np.float64) * 0.5
        encoder = RingEncoder(task, self._settings, {"point": step.shape})
        aggregator = RingAggregator(task, encoder.plan)
        for client_id in client_ids:
            own = self._one(task, client_id, step)
            secret = derive_secret(ROOT, client_id)
            aggregator.add(encoder.encode(own, secret) if isinstance(own, ClientUpdate) else own)
        return self.alter(aggregator.message())


def loop_over(settings: Settings, fleet: FakeFleet, size: int, clients: int = 10) -> tuple[Coordinator, Store]:
    store = Store.open(settings.home)
    store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
    store.clients.register(seeded_fleet(clients))
    loop = Coordinator(
        settings=settings,
        store=store,
        accountant=PrivacyAccountant(store, settings),
        fleet=fleet,
        model=PointModel(np.zeros(size, np.float32)),
        simulated=True,
    )
    return loop, store


def point(store: Store) -> Any:
    version = store.versions.latest()
    assert version is not None
    return stored_weights(store, version.weights_digest)["point"]


def charges_by_round(store: Store) -> Counter[tuple[int, str]]:
    return Counter((entry.charge.round_index, entry.charge.unit_id) for entry in store.ledger.entries())


@pytest.mark.parametrize("unit", ["client", "record"])
def test_the_sum_has_the_noise_that_is_charged(tmp_path: Path, unit: str) -> None:
    settings = settings_of(tmp_path, unit, rounds=1, min_survivors=10)
    size = 5000
    fleet = RingFleet(settings, np.zeros(size, np.float32))
    loop, store = loop_over(settings, fleet, size)
    run = loop.run()
    assert run.status is RunStatus.COMPLETED, run.reason
    task = fleet.tasks[-1][0]
    assert (task.participants, task.attempt, task.noise_place) == (10, 0, "distributed")
    events = [spend_of(entry.charge) for entry in store.ledger.entries()]
    assert len(events) == 10
    event, times = events[0]
    assert isinstance(event, DistributedGaussian)
    assert times == 1
    assert 2.0 <= event.noise_multiplier < 2.0 * 1.003
    assert event.sampling_prob == (0.25 if unit == "record" else 1.0)
    # The clients stay where they are: what moves the model is noise. Each has 10 examples.
    noise = point(store) * (10.0 if unit == "client" else 100.0)
    assert noise.std() == pytest.approx(2.0 * mechanism.sensitivity(task), rel=0.05)
    assert abs(noise.mean()) < 5 * noise.std() / size**0.5


def test_a_sum_decodes_to_the_sum_of_the_contributions(tmp_path: Path) -> None:
    settings, shapes = settings_of(tmp_path, "record"), {"b": (3,), "w": (40, 50)}
    task = replace(task_of(settings), participants=10, sum_weight=100.0, noise_multiplier=0.3)
    encoder, generator = RingEncoder(task, settings, shapes), np.random.default_rng(0)
    whole, parts = RingAggregator(task, encoder.plan), []
    for index in range(10):
        sums = {name: generator.normal(size=shape) for name, shape in shapes.items()}
        parts.append(sums)
        update = ClientUpdate(1, ClientOutcome(f"c{index}", 10), sums, 10.0)
        own = encoder.encode(update, derive_secret(ROOT, f"c{index}"))
        np.testing.assert_array_equal(own.vector, encoder.encode(update, derive_secret(ROOT, f"c{index}")).vector)
        whole.add(own)
    whole.add(ClientFailures.of(1, ["c10"], "it failed"))
    message = whole.message()
    assert (message.total_weight, len(message.outcomes)) == (100.0, 11)
    decoded = decode(encoder.plan, message.vector)
    exact = np.concatenate([sum(part["b"] for part in parts), sum(part["w"] for part in parts).ravel()])
    error = decoded - exact
    assert error.std() == pytest.approx(encoder.plan.variance(10) ** 0.5, rel=0.06)


def test_distributed_noise_is_that_of_the_server_and_noise_at_clients_n_times_as_much(tmp_path: Path) -> None:
    size, clients, errors = 4000, 25, {}
    for place in ("client", "server", "distributed"):
        settings = settings_of(tmp_path / place, "client", place, rounds=1, min_survivors=clients)
        fleet = RingFleet(settings, np.zeros(size, np.float32))
        loop, store = loop_over(settings, fleet, size, clients)
        assert loop.run().status is RunStatus.COMPLETED
        errors[place] = float(np.square(clients * point(store)).mean())
    assert errors["distributed"] == pytest.approx(errors["server"], rel=0.1)
    assert errors["client"] == pytest.approx(clients * errors["server"], rel=0.15)


def test_a_round_of_too_few_contributions_reveals_nothing(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, min_survivors=8)
    fleet = RingFleet(settings, np.zeros(50, np.float32), failing=["vehicle-0000", "vehicle-0001", "vehicle-0002"])
    loop, store = loop_over(settings, fleet, 50)
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.FAILED, 0)
    assert "secure_aggregation.min_survivors" in str(run.reason)
    assert store.versions.latest() is None


def crashed(settings: Settings, fleet: RingFleet) -> Store:
    loop, store = loop_over(settings, fleet, 50)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    return store


def test_a_crash_after_a_session_began_makes_another_attempt_which_is_charged_again(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    first = RingFleet(settings, np.zeros(50, np.float32), crash_in_round=2)
    store = crashed(settings, first)
    assert set(charges_by_round(store).values()) == {1}
    second = RingFleet(settings, np.zeros(50, np.float32))
    loop, store = loop_over(settings, second, 50)
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 2)
    attempts = [task.attempt for task, _ in (*first.tasks, *second.tasks)]
    assert attempts == [0, 0, 1]
    charged = charges_by_round(store)
    assert {charged[(1, client_id)] for _, client_id in charged} == {1}
    assert {charged[(2, client_id)] for _, client_id in charged} == {2}
    outputs = [output_id(task, "vehicle-0000", 10) for task in (first.tasks[1][0], second.tasks[0][0])]
    assert len(set(outputs)) == 2


def test_a_crash_before_a_session_began_is_charged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedvit.rounds.secure_sums.Attempts.begin", crash)
        store = crashed(settings, RingFleet(settings, np.zeros(50, np.float32)))
        assert len(store.ledger.entries()) == 10
    fleet = RingFleet(settings, np.zeros(50, np.float32))
    loop, store = loop_over(settings, fleet, 50)
    assert loop.run().status is RunStatus.COMPLETED
    assert [task.attempt for task, _ in fleet.tasks] == [0, 0]
    assert set(charges_by_round(store).values()) == {1}


def test_a_budget_that_was_spent_on_an_attempt_is_made_use_of_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path)
    with Store.open(tmp_path / "probe") as probe:
        accountant = PrivacyAccountant(probe, settings)
        run = probe.runs.create(rounds_total=1, noise_multiplier=2.0, config={}, config_digest="", data_digest="")
        task = replace(task_of(settings), participants=10, noise_multiplier=2.0)
        protection = protection_for(settings, probe)
        plan = protection.plan(task, {"point": np.zeros(50, np.float32)})
        accountant.charge(protection.charges(replace(task, run_id=run.run_id), ["a"], plan))
        once = accountant.budget().epsilon_spent
    privacy = settings.privacy.model_copy(update={"target_epsilon": 1.01 * once})
    settings = settings.model_copy(update={"privacy": privacy})

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedvit.rounds.secure_sums.Attempts.begin", crash)
        crashed(settings, RingFleet(settings, np.zeros(50, np.float32)))
    loop, store = loop_over(settings, RingFleet(settings, np.zeros(50, np.float32)), 50)
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.BUDGET_EXHAUSTED, 1)
    assert set(charges_by_round(store).values()) == {1}


@pytest.mark.parametrize(
    "alter",
    [
        lambda message: replace(message, vector=message.vector[:-1]),
        lambda message: replace(message, vector=message.vector.astype(np.int64)),
        lambda message: replace(message, vector=np.full_like(message.vector, 2**31)),
        lambda message: replace(message, total_weight=message.total_weight + 1),
        lambda message: replace(message, attempt=1),
    ],
    ids=["length", "dtype", "ring", "weight", "attempt"],
)
def test_a_vector_that_does_not_fit_the_plan_is_rejected_with_all_that_is_in_it(
    tmp_path: Path, alter: Callable[[RingSum], RingSum]
) -> None:
    settings = settings_of(tmp_path, min_survivors=5)
    fleet = RingFleet(settings, np.zeros(50, np.float32))
    fleet.alter = lambda message: alter(message) if message.outcomes[0].client_id == "vehicle-0000" else message
    loop, store = loop_over(settings, fleet, 50)
    run = loop.run()
    assert run.status is RunStatus.COMPLETED, run.reason
    assert store.rounds.get(run.run_id, 1).num_updates == 5
    assert not any(client.quarantined for client in store.clients.all())


def test_plain_updates_are_no_contributions_to_a_secure_sum_and_vectors_no_updates(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    task = replace(task_of(settings), participants=10)
    with Store.open(tmp_path) as store:
        rule = protection_for(settings, store).rule
    base, plan = {"point": np.zeros(50, np.float32)}, plan_of(task, settings, 50)
    update = ClientUpdate(1, ClientOutcome("a", 10), {"point": np.zeros(50)}, 1.0)
    vector = RingSum(1, (ClientOutcome("a", 10),), np.zeros(plan.padded, np.uint32), 1.0)
    faults = [
        [
            UpdateValidator.of(settings, rule, base, task=task, ring=ring).fault_of(one) is not None
            for ring in (None, plan)
        ]
        for one in (update, vector)
    ]
    assert faults == [[False, True], [True, False]]


def test_too_few_participants_have_no_plan(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, min_survivors=6, max_colluding=2)
    task = task_of(settings)
    assert plan_of(replace(task, participants=6), settings, 50).honest == 4
    with pytest.raises(SecureAggregationError):
        plan_of(replace(task, participants=5), settings, 50)
    with pytest.raises(SecureAggregationError):
        plan_of(replace(task, participants=3), settings_of(tmp_path, max_colluding=3), 50)


def test_a_contribution_beyond_the_clipping_norm_is_rejected(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    encoder = RingEncoder(replace(task_of(settings), participants=10), settings, {"point": (50,)})
    update = ClientUpdate(1, ClientOutcome("a", 10), {"point": np.full(50, 1.0)}, 1.0)
    with pytest.raises(UpdateRejectedError):
        encoder.encode(update, ROOT)


@pytest.mark.parametrize(
    ("masks", "simulated", "fine"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_masks_are_left_out_in_simulations_and_nowhere_else(
    tmp_path: Path, masks: bool, simulated: bool, fine: bool
) -> None:
    settings = settings_of(tmp_path, masks=masks)
    if fine:
        check_masks(settings, simulated=simulated)
        return
    with pytest.raises(ConfigError) as caught:
        check_masks(settings, simulated=simulated)
    assert "secure_aggregation.masks" in str(caught.value)


@pytest.mark.parametrize("place", ["server", "distributed"])
def test_an_update_without_enough_noise_is_not_encoded_by_itself(place: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "record", place)
    host = ClientHost(settings, data=NoData(), trainer=NoTraining(), root_secret=ROOT)
    with pytest.raises(ForbiddenError):
        host.train_encoded(task_of(settings), {}, "a", Encoding.FLOAT32)


def test_reports_say_that_masks_were_left_out(tmp_path: Path) -> None:
    warnings = []
    for place in ("server", "distributed"):
        run = Simulated("run", settings_of(tmp_path, place=place), RunStatus.COMPLETED, None, (), {}, {}, 1.0)
        warnings.append(warning_of(summary_of([run], None)))
    assert warnings == [None, NO_MASKS]


def test_the_choice_of_a_sweep_is_run_with_masks(tmp_path: Path) -> None:
    plan = TrialPlan("trial-1", {}, settings_of(tmp_path))
    chosen = load_settings(environ={}, overrides=yaml.safe_load(best_yaml(plan, ())))
    assert (chosen.privacy.noise_at, chosen.secure_aggregation.masks) == ("distributed", True)


def test_a_simulated_federation_learns_with_distributed_noise(tmp_path: Path) -> None:
    accuracies = {}
    for place in ("server", "distributed"):
        overrides = {
            "training": {
                "rounds": 6,
                "learning_rate": 0.5,
                "aggregation": "fedavg",
                "cohort": {"selection": "all", "max_participations": 9},
            },
            "privacy": {
                "privacy_unit": "client",
                "noise_at": place,
                "noise_multiplier": 0.5,
                "target_epsilon": 900.0,
                "target_delta": 1e-3,
            },
            "secure_aggregation": {"masks": False},
            "simulation": {"delays": {"dropout_prob": 0.0}},
        }
        run = simulate(load_settings(environ={}, overrides=overrides), ToyWorld(), name=place)
        assert run.status is RunStatus.COMPLETED, run.reason
        accuracies[place] = run.accuracy
    assert accuracies["distributed"] == pytest.approx(accuracies["server"], abs=0.05)
    assert accuracies["distributed"] is not None
    assert accuracies["distributed"] > 0.7
