"""Privacy of whole clients, through the real loop over a real store and ledger: draw, cap, charge, noise, restart."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.aggregation.rule import NO_FACTS
from fedvit.config import Settings
from fedvit.errors import BudgetExhaustedError, ConfigError, StateError
from fedvit.ports import POPULATION, Charge
from fedvit.privacy import mechanism
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import BandedGaussian, Event, Gaussian, PoissonGaussian, SampledTogether
from fedvit.privacy.round_cost import spend_of
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.context import RoundBase, train_task
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.protection import ClientLevel, protection_for
from fedvit.rounds.steering import AggregationSettings, change_aggregation_settings
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import ClientOutcome, Cohort, RunStatus, TrainTask, Weights, utc_now
from fedvit.updates import ClientUpdate, PartialSum, UpdateMessage

TARGET = np.array([3.0, -4.0], dtype=np.float32)
POISSON = {"selection": "poisson", "sampling_prob": 0.5}
CAPPED = {"selection": "uniform", "size": 2, "max_participations": 2}


def settings(home: Path, cohort: dict[str, Any], rounds: int = 4, **privacy: Any) -> Settings:
    return load_settings(
        environ={},
        overrides={
            "home": home,
            "training": {"rounds": rounds, "cohort": cohort},
            "privacy": {"privacy_unit": "client", "noise_multiplier": 5.0, "target_epsilon": 50.0, **privacy},
            "release": {"every_rounds": 10},
        },
    )


class Recording(FakeFleet):
    """Remembers what left the clients."""

    def __init__(self, **options: Any) -> None:
        super().__init__(TARGET, **options)
        self.answers: list[UpdateMessage] = []

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        for answer in super().train(task, weights, cohort, timeout_s=timeout_s):
            self.answers += [answer] if answer else []
            yield answer


def loop_over(
    config: Settings,
    fleet: FakeFleet | None = None,
    clients: int = 6,
    on_progress: Callable[[Any], None] = lambda _: None,
) -> tuple[Coordinator, Store]:
    store = Store.open(config.home)
    store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
    store.clients.register(seeded_fleet(clients))
    loop = Coordinator(
        settings=config,
        store=store,
        accountant=PrivacyAccountant(store, config),
        fleet=fleet or FakeFleet(TARGET),
        model=PointModel(TARGET),
        on_progress=on_progress,
    )
    return loop, store


def latest_point(store: Store) -> Any:
    version = store.versions.latest()
    assert version is not None
    return stored_weights(store, version.weights_digest)["point"]


def charged(store: Store) -> dict[str, list[Event]]:
    results: dict[str, list[Event]] = {}
    for entry in store.ledger.entries():
        event, times = spend_of(entry.charge)
        assert entry.charge.privacy_unit == "client"
        results.setdefault(entry.charge.unit_id, []).extend([event] * times)
    return results


def test_a_poisson_round_is_charged_to_everybody_whoever_was_drawn(tmp_path: Path) -> None:
    loop, store = loop_over(settings(tmp_path, POISSON, rounds=6))
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 6)
    assert charged(store) == {POPULATION: [PoissonGaussian(5.0, 0.5)] * 6}
    sizes = [len(record.cohort) for record in store.rounds.of_run(run.run_id)]
    assert len(set(sizes)) > 1, "a Poisson cohort has no fixed size"
    report = PrivacyAccountant(store, settings(tmp_path, POISSON)).budget()
    assert report.epsilon_spent == epsilon_pld({PoissonGaussian(5.0, 0.5): 6}, 1e-5)
    assert (report.privacy_unit, report.clients_charged, report.rounds_charged) == ("client", 6, 6)


def test_a_round_that_draws_nobody_is_noise_and_counts(tmp_path: Path) -> None:
    fleet = Recording()
    loop, store = loop_over(settings(tmp_path, {"selection": "poisson", "sampling_prob": 1e-9}, rounds=2), fleet)
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 2)
    assert fleet.answers == []
    assert [record.num_updates for record in store.rounds.of_run(run.run_id)] == [0, 0]
    assert len(charged(store)[POPULATION]) == 2
    assert np.any(latest_point(store) != 0)


def test_the_sum_of_clipped_updates_is_divided_by_the_expected_cohort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = {"selection": "all", "max_participations": 1}
    config = settings(tmp_path, cohort, rounds=1, noise_multiplier=4.0, l2_clip_norm=0.5)
    fleet = FakeFleet(TARGET, failing=["vehicle-0000", "vehicle-0001"])
    loop, store = loop_over(config, fleet)
    # The arithmetic shows best without any noise.
    monkeypatch.setattr(mechanism, "fresh_noise", lambda stream, size: np.zeros(size))
    run = loop.run()
    assert run.config["expected_cohort"] == 6.0
    # Four of six answered, each with a step of norm 2.5 clipped to 0.5: the sum is divided by six all the same.
    np.testing.assert_allclose(latest_point(store), 4 * 0.5 * np.array([0.6, -0.8]) / 6, rtol=1e-6)
    assert store.rounds.get(run.run_id, 1).num_updates == 4


def test_noise_has_the_deviation_that_is_charged(tmp_path: Path) -> None:
    target = np.zeros(4000, dtype=np.float32)
    config = settings(tmp_path, POISSON, rounds=1, noise_multiplier=3.0, l2_clip_norm=0.2)
    store = Store.open(config.home)
    store.clients.register(seeded_fleet(6))
    accountant = PrivacyAccountant(store, config)
    loop = Coordinator(
        settings=config, store=store, accountant=accountant, fleet=FakeFleet(target), model=PointModel(target)
    )
    run = loop.run()
    moved = latest_point(store) * float(run.config["expected_cohort"])
    assert moved.std() == pytest.approx(3.0 * 0.2, rel=0.05)
    assert abs(moved.mean()) < 5 * 0.6 / np.sqrt(4000)


@pytest.mark.parametrize(
    ("cohort", "privacy"),
    [(POISSON, {}), (CAPPED | {"max_participations": 4, "min_separation": 3}, {"noise": "banded", "bands": 3})],
)
def test_a_crash_changes_nothing_in_weights_or_ledger(
    tmp_path: Path, cohort: dict[str, Any], privacy: dict[str, Any]
) -> None:
    digests = []
    for name, crash in [("calm", None), ("crash", 3)]:
        config = settings(tmp_path / name, cohort, **privacy)
        loop, store = loop_over(config, FakeFleet(TARGET, crash_in_round=crash))
        if name == "crash":
            # The same secret, or the noise would differ for that reason.
            (tmp_path / "crash" / "keys" / "root.key").write_bytes(
                (tmp_path / "calm" / "keys" / "root.key").read_bytes()
            )
            loop, store = loop_over(config, FakeFleet(TARGET, crash_in_round=crash))
            with pytest.raises(KeyboardInterrupt):
                loop.run()
            # Another process: nothing is remembered but what is in the store.
            loop, store = loop_over(config)
        run = loop.run()
        assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 4)
        keys = Counter((e.charge.round_index, e.charge.unit_id) for e in store.ledger.entries())
        assert set(keys.values()) == {1}
        version = store.versions.latest()
        assert version is not None
        digests.append((version.weights_digest, sorted(keys)))
    assert digests[0] == digests[1]


def test_no_client_takes_part_more_often_than_the_cap_or_sooner_than_it_rested(tmp_path: Path) -> None:
    cohort = CAPPED | {"min_separation": 3}
    loop, store = loop_over(settings(tmp_path, cohort, rounds=6))
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 6)
    rounds: dict[str, list[int]] = {}
    for record in store.rounds.of_run(run.run_id):
        assert len(record.cohort) == 2
        for client_id in record.cohort:
            rounds.setdefault(client_id, []).append(record.round_index)
    assert {len(taken) for taken in rounds.values()} == {2}
    assert all(second - first >= 3 for first, second in rounds.values())
    assert charged(store) == {client_id: [Gaussian(5.0)] * 2 for client_id in rounds}
    report = PrivacyAccountant(store, settings(tmp_path, cohort)).budget()
    assert report.epsilon_spent == pytest.approx(epsilon_pld({Gaussian(5.0): 2}, 1e-5))


def test_a_run_whose_clients_are_used_up_ends_and_says_so(tmp_path: Path) -> None:
    loop, store = loop_over(settings(tmp_path, {"selection": "all", "max_participations": 2}, rounds=5))
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.BUDGET_EXHAUSTED, 2)
    assert "Each of 6 clients has taken part in 2 rounds of run-0001; the cap is 2." in str(run.reason)
    assert store.versions.latest() is not None
    assert loop.run().rounds_done == 2


def test_banded_noise_is_charged_a_participation_at_a_time(tmp_path: Path) -> None:
    cohort = CAPPED | {"min_separation": 3}
    loop, store = loop_over(settings(tmp_path, cohort, rounds=6, noise="banded", bands=3))
    assert loop.run().status is RunStatus.COMPLETED
    assert set(map(tuple, charged(store).values())) == {(BandedGaussian(5.0, 3, 3),) * 2}


def test_adaptive_clipping_moves_the_norm_and_charges_for_the_count(tmp_path: Path) -> None:
    config = settings(
        tmp_path, POISSON, l2_clip_norm=0.01, noise_multiplier=1.0, adaptive_clip={"count_noise_multiplier": 4.0}
    )
    fleet = Recording()
    loop, store = loop_over(config, fleet, clients=200)
    run = loop.run()
    assert run.status is RunStatus.COMPLETED
    ((unit, events),) = charged(store).items()
    assert (unit, len(events)) == (POPULATION, 4)
    event = events[0]
    assert isinstance(event, SampledTogether)
    assert event.events[0].noise_multiplier == pytest.approx((1.0 - 4.0**-2) ** -0.5)
    assert event.events[1] == Gaussian(4.0)
    norms = [task.l2_clip_norm for task, _ in fleet.tasks]
    # Every update is far longer than the bound: the norm grows by nearly exp(0.2 * 0.5) a round.
    assert norms[0] == 0.01
    assert all(1.05 < after / before < 1.11 for before, after in itertools.pairwise(norms))
    facts = [store.versions.get(str(r.version)).lineage["client_level"] for r in store.rounds.of_run(run.run_id)]
    assert [f["l2_clip_norm"] for f in facts] == norms
    # Continued by another process, it goes on where it was.
    assert protection_for(config, store).l2_clip_norm(run.run_id, 5) == facts[-1]["next_l2_clip_norm"]


class Lying(FakeFleet):
    """One group answers with more than its clients' bound allows."""

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        for answer in super().train(task, weights, cohort, timeout_s=timeout_s):
            if answer and any(o.client_id == "vehicle-0000" for o in answer.outcomes):
                assert isinstance(answer, PartialSum)
                answer = replace(answer, weighted_sum={"point": 1.01 * answer.weighted_sum["point"]})
            yield answer


def test_a_partial_sum_that_is_too_long_is_refused_with_all_that_is_in_it(tmp_path: Path) -> None:
    loop, store = loop_over(settings(tmp_path, {"selection": "all", "max_participations": 1}, rounds=1), Lying(TARGET))
    run = loop.run()
    assert run.status is RunStatus.COMPLETED
    version = store.versions.latest()
    assert version is not None
    assert version.lineage["clients"] == ["vehicle-0001", "vehicle-0003", "vehicle-0005"]
    assert store.rounds.participation()["vehicle-0002"].failures == 1


def test_a_client_in_quarantine_does_not_take_part_and_the_population_pays_once(tmp_path: Path) -> None:
    config = settings(tmp_path, {"selection": "poisson", "sampling_prob": 1.0}, rounds=2)
    quarantined = False

    def quarantine_in_round_two(progress: Any) -> None:
        nonlocal quarantined
        if progress.rounds_done == 1 and not quarantined:
            quarantined = True
            store.clients.quarantine(["vehicle-0003"], "incident", utc_now())

    loop, store = loop_over(config, on_progress=quarantine_in_round_two)
    run = loop.run()
    assert run.status is RunStatus.COMPLETED
    assert [record.num_updates for record in store.rounds.of_run(run.run_id)] == [6, 5]
    assert len(charged(store)[POPULATION]) == 2


def test_asynchronous_rounds_wait_for_a_poisson_sample_all_the_same(tmp_path: Path) -> None:
    loop, store = loop_over(settings(tmp_path, {"selection": "poisson", "sampling_prob": 1.0}, rounds=2))
    change_aggregation_settings(store, lambda now: AggregationSettings(mode="asynchronous", buffer_size=1))
    run = loop.run()
    assert [record.num_updates for record in store.rounds.of_run(run.run_id)] == [6, 6]


def test_a_late_update_of_a_capped_run_is_clipped_discounted_and_rests_from_where_it_counted(tmp_path: Path) -> None:
    fleet = Recording(groups=6)
    fleet.held = {"vehicle-0000"}
    config = settings(tmp_path, {"selection": "all", "max_participations": 3}, rounds=3)

    def let_go(progress: Any) -> None:
        if progress.rounds_done == 1:
            fleet.held = set()

    loop, store = loop_over(config, fleet, on_progress=let_go)
    change_aggregation_settings(store, lambda now: AggregationSettings(mode="asynchronous", buffer_size=5))
    run = loop.run()
    assert run.status is RunStatus.COMPLETED
    assert store.rounds.engagements(run.run_id, before=3)["vehicle-0000"][1] == 2
    assert len(charged(store)["vehicle-0000"]) < 3


def test_spends_of_a_client_and_of_everybody_compose(tmp_path: Path) -> None:
    config = settings(tmp_path, POISSON)
    with Store.open(tmp_path) as store:
        accountant = PrivacyAccountant(store, config)
        own = '{"kind":"gaussian","noise_multiplier":6.0}'
        accountant.charge([Charge("run-0001", 1, "a", "1" * 64, 6.0, 1.0, 1, "client", own)])
        everybody = '{"kind":"poisson_gaussian","noise_multiplier":5.0,"sampling_prob":0.5}'
        accountant.charge([Charge("run-0002", 1, POPULATION, "2" * 64, 5.0, 0.5, 1, "client", everybody)])
        both = epsilon_pld({Gaussian(6.0): 1, PoissonGaussian(5.0, 0.5): 1}, 1e-5)
        assert accountant.budget().epsilon_spent == both
        # A client that was charged nothing of its own bears the population's, and no more.
        accountant.charge([Charge("run-0003", 1, "b", "3" * 64, 6.0, 1.0, 1, "client", own)])
        assert accountant.budget().epsilon_spent == both
        assert PrivacyAccountant(store, config).budget().epsilon_spent == pytest.approx(both, abs=1e-9)


def test_the_population_s_charge_is_refused_by_the_budget_of_its_most_exposed_member(tmp_path: Path) -> None:
    own = '{"kind":"gaussian","noise_multiplier":6.0}'
    both = epsilon_pld({Gaussian(6.0): 1, PoissonGaussian(5.0, 0.5): 1}, 1e-5)
    with Store.open(tmp_path) as store:
        accountant = PrivacyAccountant(store, settings(tmp_path, POISSON, target_epsilon=both - 1e-3))
        accountant.charge([Charge("run-0001", 1, "a", "1" * 64, 6.0, 1.0, 1, "client", own)])
        everybody = '{"kind":"poisson_gaussian","noise_multiplier":5.0,"sampling_prob":0.5}'
        with pytest.raises(BudgetExhaustedError):
            accountant.charge([Charge("run-0002", 1, POPULATION, "2" * 64, 5.0, 0.5, 1, "client", everybody)])
        assert len(store.ledger.entries()) == 1


def test_a_ledger_of_records_has_no_answer_for_clients_and_one_of_clients_has_for_records(tmp_path: Path) -> None:
    config = settings(tmp_path, POISSON)
    with Store.open(tmp_path) as store:
        store.ledger.append([Charge("run-0001", 1, "a", "1" * 64, 4.0, 0.5, 1)])
        with pytest.raises(StateError):
            PrivacyAccountant(store, config)
        records = load_settings(environ={}, overrides={"home": tmp_path})
        everybody = '{"kind":"gaussian","noise_multiplier":6.0}'
        store.ledger.append([Charge("run-0002", 1, "*", "2" * 64, 6.0, 1.0, 1, "client", everybody)])
        spent = PrivacyAccountant(store, records).budget().epsilon_spent
        assert spent == epsilon_pld({PoissonGaussian(4.0, 0.5): 1, Gaussian(6.0): 1}, 1e-5)


def test_a_charge_of_an_unknown_event_is_refused_by_name(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        unknown = '{"kind":"laplace","noise_multiplier":1.0}'
        store.ledger.append([Charge("run-0001", 1, "a", "1" * 64, 1.0, 1.0, 1, "client", unknown)])
        with pytest.raises(StateError, match="laplace"):
            PrivacyAccountant(store, settings(tmp_path, POISSON))


def test_delta_above_one_over_the_number_of_clients_is_refused_at_the_start(tmp_path: Path) -> None:
    loop, store = loop_over(settings(tmp_path, POISSON, target_delta=0.2))
    with pytest.raises(ConfigError):
        loop.run()
    assert store.runs.all() == []
    assert store.ledger.entries() == []


def test_cohorts_that_cannot_rest_are_refused_at_the_start(tmp_path: Path) -> None:
    loop, _ = loop_over(settings(tmp_path, CAPPED | {"min_separation": 4}))
    with pytest.raises(ConfigError):
        loop.run()


@pytest.mark.parametrize(
    ("cohort", "privacy", "named"),
    [
        ({}, {}, "max_participations"),
        (POISSON | {"max_participations": 3}, {}, "max_participations"),
        ({"selection": "poisson"}, {}, "sampling_prob"),
        (POISSON, {"privacy_unit": "record"}, "belongs to privacy.privacy_unit"),
        (CAPPED, {"noise": "banded"}, "bands"),
        (CAPPED, {"noise": "banded", "bands": 2}, "min_separation"),
        (POISSON, {"noise": "banded", "bands": 2}, "min_separation"),
        (POISSON, {"noise_multiplier": 0.0}, "greater than or equal to 0.3"),
        (POISSON, {"target_delta": 1.0}, "less than 1"),
        (POISSON, {"target_epsilon": -1.0}, "greater than 0"),
        ({}, {"privacy_unit": "record", "adaptive_clip": {}}, "adaptive_clip"),
    ],
)
def test_settings_that_promise_nothing_are_refused(
    tmp_path: Path, cohort: dict[str, Any], privacy: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        settings(tmp_path, cohort, **privacy)


def quiet_fleet(tmp_path: Path) -> tuple[Settings, Coordinator, Store]:
    """Six clients whose updates are nothing beside the noise."""
    target = np.zeros(4000, dtype=np.float32)
    config = settings(tmp_path, {"selection": "all", "max_participations": 2}, rounds=2)
    store = Store.open(config.home)
    store.clients.register(seeded_fleet(6))
    accountant = PrivacyAccountant(store, config)
    loop = Coordinator(
        settings=config, store=store, accountant=accountant, fleet=FakeFleet(target), model=PointModel(target)
    )
    return config, loop, store


def test_no_two_rounds_share_noise(tmp_path: Path) -> None:
    _, loop, store = quiet_fleet(tmp_path)
    run = loop.run()
    first, second = (
        stored_weights(store, store.versions.get(str(record.version)).weights_digest)["point"]
        for record in store.rounds.of_run(run.run_id)
    )
    assert abs(np.corrcoef(first, second - first)[0, 1]) < 0.1


def test_a_repeated_round_repeats_its_noise_and_one_with_another_sum_does_not(tmp_path: Path) -> None:
    config, loop, store = quiet_fleet(tmp_path)
    run = loop.run()
    task = train_task(
        config,
        run.run_id,
        1,
        base_digest="b" * 64,
        data_digest="",
        noise_multiplier=run.noise_multiplier,
        l2_clip_norm=config.privacy.l2_clip_norm,
        context_digest="",
    )
    weights = {"point": np.zeros(4000, dtype=np.float32)}

    def folded(size: float) -> Any:
        update = ClientUpdate(1, ClientOutcome("vehicle-0000", 1), {"point": np.full(4000, size)}, 1.0, 1)
        # Another process each time.
        protection = ClientLevel(config, store)
        base = RoundBase.of(protection.rule, weights, "", {})
        return protection.fold(run, task, base, [update], NO_FACTS).weights["point"]

    once, again, other = folded(1e-6), folded(1e-6), folded(2e-6)
    np.testing.assert_array_equal(once, again)
    assert abs(np.corrcoef(once, other)[0, 1]) < 0.1
