"""Virtual time: delays by their distribution, answers in the order of their arrival, and faults by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedvit.config import DelayConfig, FaultConfig
from fedvit.errors import ConfigError
from fedvit.settings import load_settings
from fedvit.tools.simulation.delays import Delays
from fedvit.tools.simulation.faults import Faults
from fedvit.tools.simulation.fleet import SILENT, SimulatedFleet, VirtualClock
from fedvit.types import ClientOutcome, Cohort, TrainTask, Weights
from fedvit.updates import ClientUpdate

V = [f"v{i:03d}" for i in range(40)]


def task_of(round_index: int) -> TrainTask:
    return TrainTask("run-0001", round_index, "b" * 64, "d" * 64, 0.3, 1.0, 1.0, 1, 0.1)


class RecordingClients:
    """Clients that do no work and record when they are called."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.calls: list[tuple[float, str, int, float]] = []

    def answer(self, task: TrainTask, weights: Weights, client_id: str) -> ClientUpdate:
        self.calls.append((self.clock.monotonic(), client_id, task.round_index, float(weights["w"][0])))
        return ClientUpdate(task.round_index, ClientOutcome(client_id, 1), {"w": np.ones(1)}, 1.0)


def fleet_of(seed: int = 0, poll_s: float = 1e9, **delays: float | str) -> tuple[SimulatedFleet, RecordingClients]:
    clock = VirtualClock()
    recorder = RecordingClients(clock)
    return SimulatedFleet(recorder, Delays(DelayConfig(**delays), seed), clock, poll_s=poll_s), recorder  # type: ignore[arg-type]


def weights(value: float) -> Weights:
    return {"w": np.array([value], dtype=np.float32)}


# --- delays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_variance_share", [0.0, 0.5, 1.0])
def test_delays_are_log_normal_whatever_part_of_them_is_the_clients_own(client_variance_share: float) -> None:
    delays = Delays(
        DelayConfig(median_s=100.0, sigma=1.2, client_variance_share=client_variance_share, dropout_prob=0.0), seed=3
    )
    logs = np.log([[delays.of_task(f"v{i}", n).duration_s for n in range(8)] for i in range(1500)])
    # A mean of 1,500 clients' or 12,000 tasks' normals: five standard errors at least.
    assert logs.mean() == pytest.approx(np.log(100.0), abs=0.16)
    assert logs.std() == pytest.approx(1.2, rel=0.1)
    of_clients = logs.mean(axis=1).var() - logs.var(axis=1, ddof=1).mean() / 8
    assert of_clients / 1.2**2 == pytest.approx(client_variance_share, abs=0.1)


def test_a_delay_depends_on_seed_client_and_round_and_on_nothing_drawn_before() -> None:
    config = DelayConfig()
    first = Delays(config, 1)
    here = first.of_task("a", 1)
    first.of_task("b", 7)
    assert first.of_task("a", 1) == Delays(config, 1).of_task("a", 1) == here
    others = [first.of_task("a", 2), first.of_task("b", 1), Delays(config, 2).of_task("a", 1)]
    assert len({trip.duration_s for trip in [here, *others]}) == 4


def test_a_tenth_drops_out_and_the_silence_is_noticed_later() -> None:
    delays = Delays(DelayConfig(kind="constant", median_s=100.0, dropout_prob=0.1, dropout_detection_s=40.0), 0)
    trips = [delays.of_task(f"v{i}", 1) for i in range(4000)]
    assert sum(not trip.answers for trip in trips) == pytest.approx(400, abs=95)
    assert {trip.duration_s for trip in trips if trip.answers} == {100.0}
    silent = [trip.duration_s for trip in trips if not trip.answers]
    assert 40.0 <= min(silent) <= 45.0
    assert 135.0 <= max(silent) <= 140.0


# --- the fleet -------------------------------------------------------------------------------------------------------


def test_answers_arrive_in_virtual_order_and_the_work_is_done_when_they_do() -> None:
    fleet, recorder = fleet_of(dropout_prob=0.0)
    arrived = []
    for answer in fleet.train(task_of(1), weights(1.0), Cohort(1, tuple(V))):
        assert answer is not None
        arrived.append((recorder.clock.monotonic(), answer.outcomes[0].client_id))
    assert sorted(name for _, name in arrived) == V
    assert arrived == sorted(arrived)
    assert [(at, name) for at, name, _, _ in recorder.calls] == arrived
    expected = max(Delays(DelayConfig(dropout_prob=0.0), 0).of_task(name, 1).duration_s for name in V)
    assert recorder.clock.monotonic() == expected


def test_who_is_left_in_flight_answers_a_later_round_with_the_weights_of_its_task() -> None:
    fleet, recorder = fleet_of(dropout_prob=0.0)
    first = fleet.train(task_of(1), weights(1.0), Cohort(1, tuple(V[:6])))
    for _ in range(2):
        next(first)
    left = fleet.in_flight()
    assert len(left) == 4
    fresh = tuple(name for name in V[:8] if name not in left)
    answers = list(fleet.train(task_of(2), weights(2.0), Cohort(2, fresh)))
    started = {a.outcomes[0].client_id: a.round_index for a in answers if a}
    assert started == dict.fromkeys(left, 1) | dict.fromkeys(fresh, 2)
    assert {name: value for _, name, started_in, value in recorder.calls if value != started_in} == {}


def test_silence_ends_a_round_and_those_given_up_cost_no_work() -> None:
    fleet, recorder = fleet_of(kind="constant", median_s=100.0, dropout_prob=0.0)
    assert list(fleet.train(task_of(1), weights(1.0), Cohort(1, tuple(V)), timeout_s=99.0)) == []
    assert recorder.clock.monotonic() == 99.0
    given_up = fleet.give_up("too late")
    assert [(a.outcomes[0].client_id, a.outcomes[0].error) for a in given_up] == [(name, "too late") for name in V]
    assert (fleet.in_flight(), recorder.calls) == (frozenset(), [])
    assert fleet.counts == {"sent": 40, "given_up": 40}


@pytest.mark.parametrize(("stops", "second_due_s"), [(False, 200.0), (True, 160.0)])
def test_one_that_is_given_up_works_on_unless_it_is_stopped(stops: bool, second_due_s: float) -> None:
    fleet, recorder = fleet_of(kind="constant", median_s=100.0, dropout_prob=0.0, stop_on_cancel=stops)
    assert list(fleet.train(task_of(1), weights(1.0), Cohort(1, ("v000",)), timeout_s=60.0)) == []
    fleet.give_up("too late")
    assert len(list(fleet.train(task_of(2), weights(2.0), Cohort(2, ("v000",))))) == 1
    assert recorder.calls == [(second_due_s, "v000", 2, 2.0)]


def test_the_caller_may_think_again_at_the_very_look() -> None:
    fleet, recorder = fleet_of(poll_s=37.5, kind="constant", median_s=700.0, dropout_prob=0.0)
    recorder.clock.advance_to(12345.678)
    began_s, looks = recorder.clock.monotonic(), []
    for answer in fleet.train(task_of(1), weights(1.0), Cohort(1, ("v000",)), timeout_s=1e6):
        looks.append(recorder.clock.monotonic())
        assert (answer is None) == (recorder.clock.monotonic() < began_s + 700.0)
    assert len(looks) == 19
    assert looks[15] == began_s + 600.0


def test_one_that_drops_out_is_an_outcome_and_no_work() -> None:
    fleet, recorder = fleet_of(dropout_prob=0.5)
    answers = list(fleet.train(task_of(1), weights(1.0), Cohort(1, tuple(V))))
    silent = {a.outcomes[0].client_id for a in answers if a and a.outcomes[0].error == SILENT}
    assert 8 <= len(silent) <= 32
    assert silent.isdisjoint(name for _, name, _, _ in recorder.calls)
    assert fleet.counts == {"sent": 40, "silent": len(silent), "answered": 40 - len(silent), "failed": 0}


# --- faults ----------------------------------------------------------------------------------------------------------


def altered(*kinds: str, **how: float) -> ClientUpdate:
    faults = Faults([FaultConfig(share=1.0, kinds=kinds, **how)], ["a"], seed=0)  # type: ignore[arg-type]
    answer = ClientUpdate(1, ClientOutcome("a", 5), {"b": np.array([10.0, 20.0]), "c": np.array([[-5.0]])}, 5.0)
    return faults.alter("a", answer)


def test_faults_by_hand_one_after_another() -> None:
    np.testing.assert_array_equal(altered("sign_flip").weighted_sum["b"], [-10.0, -20.0])
    np.testing.assert_array_equal(altered("scale", factor=10.0).weighted_sum["c"], [[-50.0]])
    np.testing.assert_array_equal(altered("sign_flip", "scale", factor=3.0).weighted_sum["b"], [-30.0, -60.0])
    np.testing.assert_array_equal(altered("nan").weighted_sum["b"], [np.nan, 20.0])
    np.testing.assert_array_equal(altered("label_flip").weighted_sum["b"], [10.0, 20.0])
    noisy = altered("noise", noise_stddev=0.1)
    # Of the update, which weighs five times as much in the sum.
    assert 0 < abs(noisy.weighted_sum["b"][0] - 10.0) < 5 * 0.6
    assert noisy.total_weight == 5.0


def test_groups_are_disjoint_shares_of_the_fleet_and_another_seed_draws_others() -> None:
    groups = [FaultConfig(share=0.2, kinds=("sign_flip",)), FaultConfig(share=0.3, kinds=("label_flip",))]
    faults = Faults(groups, V, seed=0)
    assert [list(faults.of.values()).count(group) for group in groups] == [8, 12]
    assert faults.of == Faults(groups, V[::-1], seed=0).of
    assert faults.of.keys() != Faults(groups, V, seed=1).of.keys()
    labels = np.arange(4)
    flipped = {name: faults.labels(name, labels, 4).tolist() for name in V}
    assert [flipped[name] == [3, 2, 1, 0] for name in V] == [faults.of.get(name) == groups[1] for name in V]


def test_wrong_settings_name_key_and_what_is_allowed() -> None:
    for overrides, phrase in [
        ({"faults": [{"share": 0.2, "kinds": ["lie"]}]}, r"simulation.faults.0.kinds.0.*'sign_flip'.*'label_flip'"),
        ({"faults": [{"share": 0.6, "kinds": ["nan"]}] * 2}, "more than the whole fleet"),
        ({"delays": {"sigam": 1.0}}, "'simulation.delays.sigam' is no setting. Did you mean 'sigma'"),
    ]:
        with pytest.raises(ConfigError, match=phrase):
            load_settings(environ={}, overrides={"simulation": overrides})
    with pytest.raises(ConfigError, match=r"private false needs privacy\.privacy_unit 'record'"):
        load_settings(
            environ={},
            overrides={
                "simulation": {"private": False},
                "privacy": {"privacy_unit": "client"},
                "training": {"cohort": {"selection": "poisson", "sampling_prob": 0.5}},
            },
        )
