"""Asynchronous rounds: over a real store and a real ledger, with a fleet whose slow clients answer when a test says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.cohort.selection import draw_cohort
from fedvit.config import CohortConfig, Settings
from fedvit.registry.publisher import stored_weights
from fedvit.rounds import machine as m
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.steering import (
    AggregationSettings,
    RunRequest,
    aggregation_settings,
    change_aggregation_settings,
    change_round_settings,
)
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, PointModel, seeded_fleet
from fedvit.types import Cohort, RunStatus, TrainingProgress, utc_now

TARGET = np.array([1.0, -2.0], dtype=np.float32)
V0, V1, V2, V3 = (f"vehicle-{i:04d}" for i in range(4))


class Training:
    """A run of four clients, each behind a proxy of its own; they answer in the order 3, 2, 1, 0."""

    def __init__(self, home: Path, *, rounds: int = 4, groups: int = 4, **steering: Any) -> None:
        self.settings: Settings = load_settings(
            environ={},
            overrides={
                "home": home,
                "training": {"rounds": rounds},
                "privacy": {"noise_multiplier": 4.0},
                "release": {"every_rounds": 1000, "max_accuracy_drop": 1.0},
            },
        )
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register(seeded_fleet(4))
        self.on_progress: Callable[[TrainingProgress], object] = lambda _: None
        self.steer(**steering)
        self.process(groups)

    def process(self, groups: int = 4) -> None:
        """Another process takes over."""
        self.fleet = FakeFleet(TARGET, groups=groups)
        self.loop = Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=GenerousAccountant(self.store),
            fleet=self.fleet,
            model=PointModel(TARGET),
            on_progress=lambda progress: self.on_progress(progress),
        )

    def steer(self, **changes: Any) -> None:
        change_aggregation_settings(self.store, lambda now: replace(now, **changes))

    def after(self, rounds_done: int, act: Callable[[], object]) -> None:
        """Act once, when so many rounds are committed and the next is not begun."""
        acted = []

        def look(progress: TrainingProgress) -> None:
            if progress.rounds_done == rounds_done and not acted:
                acted.append(act())

        self.on_progress = look

    def run(self) -> RunStatus:
        return self.loop.run().status

    def updates(self) -> list[int]:
        return [record.num_updates for record in self.store.rounds.of_run("run-0001") if record.committed]

    def lineage(self, round_index: int) -> dict[str, Any]:
        return dict(self.store.versions.get(f"v1.1.{round_index}").lineage)

    def point(self, round_index: int) -> Any:
        return stored_weights(self.store, self.store.versions.get(f"v1.1.{round_index}").weights_digest)["point"]

    def charged(self) -> Counter[str]:
        return Counter(entry.charge.unit_id for entry in self.store.ledger.entries())

    def answered(self) -> Counter[str]:
        """By client, how many of its updates were folded, rejected or failed."""
        answers = (answer for run in self.store.runs.all() for answer in self.store.rounds.answers(run.run_id))
        return Counter(client_id for _, client_id, _ in answers)


# --- the machine and the draw ----------------------------------------------------------------------------------------


def test_those_in_flight_count_as_taking_part_and_the_last_round_waits_for_all() -> None:
    state, _ = m.step(m.LoopState(m.RunPlan(2, 3, 9)), m.Started(0))
    orders = []
    for index in (1, 2):
        cohort = Cohort(index, ("a",))
        state, effects = m.step(state, m.CohortDrawn(cohort, in_flight=2))
        assert effects == (m.ChargeRound(cohort),)
        state, effects = m.step(state, m.Charged())
        orders += effects
        state, _ = m.step(state, m.Trained(3, 0))
        state, _ = m.step(state, m.Committed(f"v{index}"))
    assert orders == [m.TrainRound(Cohort(1, ("a",)), 3, False), m.TrainRound(Cohort(2, ("a",)), 3, True)]


def test_too_few_with_those_in_flight_end_the_run_in_words() -> None:
    state, _ = m.step(m.LoopState(m.RunPlan(2, 4, 9)), m.Started(0))
    _, effects = m.step(state, m.CohortDrawn(Cohort(1, ("a",)), in_flight=2))
    assert effects == (m.EndRun(RunStatus.FAILED, "Round 1 has 3 eligible clients; at least 4 are needed."),)


@pytest.mark.parametrize(("config", "drawn"), [(CohortConfig(), 18), (CohortConfig(selection="uniform", size=5), 3)])
def test_who_is_in_flight_is_not_drawn_and_takes_up_a_place(config: CohortConfig, drawn: int) -> None:
    ids = [f"v{i:02d}" for i in range(20)]
    for index in range(50):
        cohort = draw_cohort(config, ids, run_id="r", round_index=index, secret=bytes(32), in_flight={"v03", "v11"})
        assert len(cohort.client_ids) == drawn
        assert not {"v03", "v11"} & set(cohort.client_ids)


@pytest.mark.parametrize(
    ("buffer_size", "taking_part", "min_clients", "enough"),
    [(None, 4, 1, 2), (None, 5, 1, 3), (None, 4, 3, 3), (3, 9, 1, 3), (3, 9, 5, 5), (7, 4, 1, 4), (None, 0, 2, 2)],
)
def test_how_many_updates_are_enough(buffer_size: int | None, taking_part: int, min_clients: int, enough: int) -> None:
    settings = AggregationSettings(mode="asynchronous", buffer_size=buffer_size)
    assert settings.enough(taking_part, min_clients) == enough
    assert replace(settings, mode="synchronous").enough(taking_part, min_clients) is None


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_rounds_commit_with_exactly_k_and_fold_late_updates_by_hand(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous")
    assert training.run() is RunStatus.COMPLETED
    # Half of four. Whoever was left over in one round comes first in the next; the last round waits for all.
    assert training.updates() == [2, 2, 2, 4]
    assert [training.lineage(n)["aggregation"]["staleness"] for n in (1, 2, 3, 4)] == [
        {V2: 0, V3: 0},
        {V0: 1, V1: 1},
        {V2: 1, V3: 1},
        {V0: 1, V1: 1, V2: 0, V3: 0},
    ]
    late = 2**-0.5
    first = 0.5
    second = first + late * 0.5
    third = second + late * 0.5 * (1 - first)
    fourth = third + (late * 0.5 * (1 - second) + 0.5 * (1 - third)) / 2
    for index, share in enumerate((first, second, third, fourth), start=1):
        np.testing.assert_allclose(training.point(index), share * TARGET, rtol=1e-6)
    assert training.lineage(4)["aggregation"]["mode"] == "asynchronous"
    assert training.charged() == training.answered() == {V0: 2, V1: 2, V2: 3, V3: 3}
    assert [cohort.client_ids for _, cohort in training.fleet.tasks] == [(V0, V1, V2, V3), (V2, V3), (V0, V1), (V2, V3)]


def test_the_fewest_clients_are_waited_for_whatever_the_buffer(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous", buffer_size=1)
    change_round_settings(training.store, training.settings, min_clients=3)
    assert training.run() is RunStatus.COMPLETED
    assert training.updates()[0] == 3


def test_beyond_the_tolerance_an_update_is_refused_and_its_client_refreshed(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous", buffer_size=3, staleness_tolerance=1)
    training.fleet.held.add(V0)
    training.after(2, training.fleet.held.clear)
    assert training.run() is RunStatus.COMPLETED
    assert training.updates() == [3, 3, 3, 4]
    assert training.lineage(3)["clients"] == [V1, V2, V3]
    record = training.lineage(3)["aggregation"]
    assert record["refused"] == {V0: "its update is 2 versions old; at most 1 are tolerated"}
    assert V0 in training.fleet.tasks[3][1].client_ids
    assert training.charged() == training.answered() == {V0: 2, V1: 4, V2: 4, V3: 4}


def test_a_round_that_hangs_ends_when_the_mode_turns_asynchronous(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.fleet.held.add(V0)
    training.fleet.on_silence = lambda: training.steer(mode="asynchronous", buffer_size=3)
    training.after(1, training.fleet.held.clear)
    assert training.run() is RunStatus.COMPLETED
    assert training.updates()[0] == 3
    assert training.lineage(2)["aggregation"]["staleness"][V0] == 1
    assert training.charged() == training.answered()


def test_turning_synchronous_waits_for_all_in_flight_and_then_is_as_ever(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous", buffer_size=3)
    training.fleet.held.add(V0)
    training.fleet.on_silence = training.fleet.held.clear
    training.after(2, lambda: training.steer(mode="synchronous"))
    assert training.run() is RunStatus.COMPLETED
    assert training.updates() == [3, 3, 4, 4]
    third = training.lineage(3)
    assert third["aggregation"] == {"mode": "synchronous", "staleness": {V0: 2, V1: 0, V2: 0, V3: 0}, "refused": {}}
    share = 0.5 + 0.25
    share += (3 * 0.5 * (1 - share) + 3**-0.5 * 0.5) / 4
    np.testing.assert_allclose(training.point(3), share * TARGET, rtol=1e-6)
    # The round's own cohort is what was drawn for it; the late one belongs to an earlier one's.
    assert training.store.rounds.get("run-0001", 3).cohort == (V1, V2, V3)
    assert "aggregation" not in training.lineage(4)
    assert training.charged() == training.answered() == {V0: 2, V1: 4, V2: 4, V3: 4}


@pytest.mark.parametrize("seed", range(3))
def test_a_mode_switched_at_random_loses_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    rounds = 20
    training = Training(tmp_path, rounds=rounds, groups=3)
    draw, fleet = random.Random(seed), training.fleet

    def stir(progress: TrainingProgress) -> None:
        training.steer(
            mode=draw.choice(["synchronous", "asynchronous"]),
            staleness_tolerance=draw.randrange(4),
            buffer_size=draw.choice([None, 1, 2, 3, 4]),
        )
        fleet.held = set(draw.sample([V0, V1, V2, V3], draw.randrange(3)))

    training.on_progress = stir
    # Two may be held in one group: then letting one go is not enough, and the round's patience is over.
    fleet.on_silence = lambda: fleet.held.discard(min(fleet.held))
    assert training.run() is RunStatus.COMPLETED
    assert fleet.in_flight() == frozenset()
    assert training.charged() == training.answered()
    started = Counter(client_id for _, cohort in fleet.tasks for client_id in cohort.client_ids)
    assert started == training.charged()
    assert [v.version for v in training.store.versions.all()] == [f"v1.1.{n}" for n in range(rounds, 0, -1)]
    modes = [training.lineage(n).get("aggregation", {}).get("mode") for n in range(1, rounds + 1)]
    assert {None, "asynchronous"} <= set(modes)
    refused = [training.lineage(n).get("aggregation", {}).get("refused") for n in range(1, rounds + 1)]
    assert any(refused)


# --- silence, stops, incidents and crashes ---------------------------------------------------------------------------


def test_the_silent_stay_in_flight_uncharged_until_the_last_round_gives_them_up(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous", buffer_size=4)
    training.fleet.held.add(V0)
    assert training.run() is RunStatus.COMPLETED
    assert training.updates() == [3, 3, 3, 3]
    assert training.charged() == training.answered() == {V0: 1, V1: 4, V2: 4, V3: 4}
    assert training.lineage(4)["clients"] == [V1, V2, V3]


def test_when_all_are_silent_the_run_says_so_and_goes_on_later(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous")
    training.fleet.held |= {V0, V1, V2, V3}
    assert training.run() is RunStatus.FAILED
    reason = training.store.runs.get("run-0001").reason
    assert reason is not None
    assert "0 updates (4 clients failed, the first with: no answer in 600 s)" in reason
    training.fleet.held.clear()
    assert training.run() is RunStatus.COMPLETED


def test_what_is_in_flight_at_a_stop_is_folded_when_the_run_goes_on(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous")
    training.after(0, training.loop.request_stop)
    assert training.run() is RunStatus.STOPPED
    assert training.fleet.in_flight() == {V0, V1}
    assert training.run() is RunStatus.COMPLETED
    assert training.lineage(2)["aggregation"]["staleness"] == {V0: 1, V1: 1}
    assert training.charged() == training.answered()


def test_what_is_in_flight_when_another_run_begins_is_not_folded_into_it(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous")
    training.after(0, training.loop.request_stop)
    assert training.run() is RunStatus.STOPPED
    assert training.fleet.in_flight() == {V0, V1}
    training.loop.begin(RunRequest(0, "op-1", "again"))
    assert training.run() is RunStatus.COMPLETED
    assert training.store.versions.get("v1.2.1").lineage["clients"] == [V2, V3]
    assert training.fleet.tasks[1][1].client_ids == (V0, V1, V2, V3)
    assert training.charged() - training.answered() == {V0: 1, V1: 1}


def test_a_round_tried_again_in_the_same_process_hands_nothing_out_twice(tmp_path: Path) -> None:
    training = Training(tmp_path, rounds=1)
    training.fleet.held.add(V0)

    def fault() -> None:
        raise RuntimeError("a fault")

    training.fleet.on_silence = fault
    with pytest.raises(RuntimeError):
        training.run()
    training.fleet.held.clear()
    assert training.run() is RunStatus.COMPLETED
    assert [cohort.client_ids for _, cohort in training.fleet.tasks] == [(V0, V1, V2, V3), (V1, V2, V3)]
    assert training.lineage(1)["clients"] == [V0, V1, V2, V3]
    assert training.charged() == training.answered()


def test_a_crash_loses_what_is_in_flight_charged_and_never_folded(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous", buffer_size=3)
    training.fleet.held.add(V0)
    training.after(1, lambda: training.fleet.held.add(V1))

    def crash() -> None:
        raise KeyboardInterrupt

    training.fleet.on_silence = crash
    with pytest.raises(KeyboardInterrupt):
        training.run()
    crashed, cohort = training.fleet.tasks[-1]
    assert (crashed.round_index, cohort.client_ids) == (2, (V1, V2, V3))
    charged = len(training.store.ledger.entries())
    training.process()
    assert training.run() is RunStatus.COMPLETED
    assert training.fleet.tasks[0] == (crashed, cohort)
    # The repeated round is charged once; the lost update of round 1 stays on the ledger.
    assert charged == 4 + 3
    assert training.charged() - training.answered() == {V0: 1}
    assert training.answered() - training.charged() == {}
    assert training.store.ledger.verify() == len(training.store.ledger.entries())


@pytest.mark.parametrize(("groups", "refused"), [(4, {V0}), (2, {V0, V2})])
def test_a_client_quarantined_in_flight_is_kept_out(tmp_path: Path, groups: int, refused: set[str]) -> None:
    training = Training(tmp_path, groups=groups, mode="asynchronous", buffer_size=2)
    training.fleet.held.add(V0)

    def incident() -> None:
        training.store.clients.quarantine([V0], "a breach", utc_now())
        training.fleet.held.clear()

    training.after(1, incident)
    assert training.run() is RunStatus.COMPLETED
    record = training.lineage(2)["aggregation"]["refused"]
    assert set(record) == refused
    assert record[V0] == "an incident keeps it in quarantine"
    assert all(V0 not in training.lineage(n)["clients"] for n in (1, 2, 3, 4))
    assert [V0 in cohort.client_ids for _, cohort in training.fleet.tasks] == [True, False, False, False]
    assert training.charged() == training.answered()


def test_a_synchronous_round_too_keeps_out_who_is_quarantined_while_it_trains(tmp_path: Path) -> None:
    training = Training(tmp_path, rounds=1)
    training.fleet.held.add(V0)

    def incident() -> None:
        training.store.clients.quarantine([V0], "a breach", utc_now())
        training.fleet.held.clear()

    training.fleet.on_silence = incident
    assert training.run() is RunStatus.COMPLETED
    assert training.lineage(1)["clients"] == [V1, V2, V3]


def test_a_retried_round_leaves_out_who_was_quarantined_since(tmp_path: Path) -> None:
    training = Training(tmp_path, rounds=1)
    training.fleet.crash_in_round = 1
    with pytest.raises(KeyboardInterrupt):
        training.run()
    training.store.clients.quarantine([V0], "a breach", utc_now())
    assert training.run() is RunStatus.COMPLETED
    assert [cohort.client_ids for _, cohort in training.fleet.tasks] == [(V0, V1, V2, V3), (V1, V2, V3)]
    assert training.lineage(1)["clients"] == [V1, V2, V3]


def test_the_settings_are_kept(tmp_path: Path) -> None:
    training = Training(tmp_path, mode="asynchronous", staleness_tolerance=7)
    training.store.close()
    with Store.open(tmp_path) as store:
        assert aggregation_settings(store) == AggregationSettings(1, "asynchronous", 7, None)
