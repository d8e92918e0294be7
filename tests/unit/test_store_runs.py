"""Fleet, runs, rounds, versions and releases: idempotent, numbered without gaps, all or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedvit.errors import ConflictError, NotFoundError, StateError
from fedvit.store import rounds
from fedvit.store.records import FleetInfo, RoundCommit
from fedvit.store.store import Store
from fedvit.store.versions import insert_version
from fedvit.types import Client, ClientKind, ClientOutcome, Cohort, ModelVersion, Run, RunStatus

COHORT = ("a", "b", "c")
COMMIT = RoundCommit(
    weights_digest="1" * 64,
    frozen_digest="2" * 64,
    epsilon=0.5,
    loss=1.25,
    accuracy=0.75,
    metrics={"loss": 1.25, "accuracy": 0.75},
    lineage={"base": "3" * 64},
    outcomes=(ClientOutcome("a", 40), ClientOutcome("b", 30), ClientOutcome("c", 0, "timed out")),
    duration_s=2.5,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "var") as store:
        yield store


@pytest.fixture
def run(store: Store) -> Run:
    return new_run(store)


def new_run(store: Store) -> Run:
    config = {"training": {"rounds": 20}}
    return store.runs.create(
        rounds_total=20, noise_multiplier=1.5, config=config, config_digest="c" * 64, data_digest="d" * 64
    )


def commit(store: Store, run: Run, rounds: int) -> list[ModelVersion]:
    first = store.runs.get(run.run_id).rounds_done + 1
    versions = []
    for index in range(first, first + rounds):
        store.rounds.open(run.run_id, index, Cohort(index, COHORT))
        versions.append(store.rounds.commit(run.run_id, index, COMMIT))
    return versions


# --- fleet ---


def test_a_folder_belongs_to_one_fleet(store: Store) -> None:
    fleet: dict[str, Any] = {
        "data_digest": "d" * 64,
        "partition": {"scheme": "iid", "clients": 3},
        "classes": ["red", "green"],
    }
    store.metadata.bind_fleet(**fleet)
    store.metadata.bind_fleet(**fleet)
    assert store.metadata.fleet() == FleetInfo("d" * 64, {"scheme": "iid", "clients": 3}, ("red", "green"))


@pytest.mark.parametrize(
    ("name", "value"), [("data_digest", "e" * 64), ("partition", {"clients": 4}), ("classes", ["green", "red"])]
)
def test_another_fleet_is_refused_by_name(store: Store, name: str, value: object) -> None:
    fleet: dict[str, Any] = {"data_digest": "d" * 64, "partition": {"clients": 3}, "classes": ["red", "green"]}
    store.metadata.bind_fleet(**fleet)
    other = fleet | {name: value}
    with pytest.raises(StateError) as caught:
        store.metadata.bind_fleet(**other)
    assert fleet["data_digest"] in caught.value.message
    assert other["data_digest"] in caught.value.message
    assert caught.value.details["differing"] == [name]
    assert store.metadata.fleet() == FleetInfo("d" * 64, {"clients": 3}, ("red", "green"))


def test_ten_thousand_clients_register_once(store: Store) -> None:
    clients = [Client(f"vehicle-{i:05d}", ClientKind.VIRTUAL, i, admitted_examples=i) for i in range(10_000)]
    assert store.clients.register(clients[:4_000]) == 4_000
    assert store.clients.register(clients) == 6_000
    assert store.clients.register(clients) == 0
    assert store.clients.count() == 10_000
    assert store.clients.all() == clients
    assert store.clients.page(9_998, 10).clients == tuple(clients[9_998:])
    assert store.clients.page(3, 2).clients == tuple(clients[3:5])


def test_registering_nobody_is_harmless(store: Store) -> None:
    assert store.clients.register([]) == 0
    assert store.clients.all() == []


def test_registering_again_refreshes_facts_but_not_an_operator_s_decisions(store: Store) -> None:
    first = Client("a", ClientKind.REMOTE, 10, validated=False, capabilities={"gpu": False})
    store.clients.register([first])
    store.clients.update("a", validated=True, active=False)
    again = replace(first, num_examples=12, capabilities={"gpu": True}, active=True, validated=False)
    assert store.clients.register([again]) == 0
    decided = {"active": False, "validated": True, "registered_at": first.registered_at}
    assert store.clients.get("a") == replace(again, **decided, admitted_examples=12)


def test_a_client_given_twice_counts_once_and_the_last_word_holds(store: Store) -> None:
    twice = [Client("a", ClientKind.VIRTUAL, 1), Client("a", ClientKind.VIRTUAL, 2)]
    assert store.clients.register(twice) == 1
    assert store.clients.get("a").num_examples == 2


def test_clients_are_filtered_and_ordered(store: Store) -> None:
    states = {"d": (True, True), "b": (True, False), "a": (False, True), "c": (False, False)}
    store.clients.register(
        [Client(name, ClientKind.VIRTUAL, 1, active=act, validated=val) for name, (act, val) in states.items()]
    )
    for active in (None, True, False):
        wanted = sorted(name for name, (is_active, _) in states.items() if active in (None, is_active))
        results = store.clients.all(active=active)
        assert [client.client_id for client in results] == wanted
        assert [client.validated for client in results] == [states[name][1] for name in wanted]
        assert store.clients.count(active=active) == len(wanted)


def test_set_client_changes_only_what_it_names(store: Store) -> None:
    store.clients.register([Client("a", ClientKind.VIRTUAL, 1)])
    assert store.clients.update("a", active=False).active is False
    changed = store.clients.update("a", validated=False)
    assert (changed.active, changed.validated) == (False, False)
    assert store.clients.get("a") == changed


def test_an_unknown_client_is_not_found(store: Store) -> None:
    with pytest.raises(NotFoundError):
        store.clients.get("nobody")
    with pytest.raises(NotFoundError):
        store.clients.update("nobody", active=True)


# --- runs ---


def test_a_run_is_remembered_as_it_was_begun(store: Store, run: Run) -> None:
    assert (run.run_id, run.ordinal, run.status, run.rounds_done) == ("run-0001", 1, RunStatus.RUNNING, 0)
    assert run.config == {"training": {"rounds": 20}}
    assert run.started_at.tzinfo is not None
    assert store.runs.get("run-0001") == store.runs.latest() == run


def test_only_one_run_can_be_continued(store: Store, run: Run) -> None:
    for status in filter(lambda status: status.resumable, RunStatus):
        store.runs.set_status(run.run_id, status)
        with pytest.raises(ConflictError):
            new_run(store)
    store.runs.set_status(run.run_id, RunStatus.COMPLETED)
    second = new_run(store)
    assert second.run_id == "run-0002"
    with pytest.raises(ConflictError):
        store.runs.set_status(run.run_id, RunStatus.RUNNING)
    assert [known.run_id for known in store.runs.all()] == ["run-0001", "run-0002"]


def test_a_status_carries_its_reason_and_its_end(store: Store, run: Run) -> None:
    stopped = store.runs.set_status(run.run_id, RunStatus.STOPPED, "asked to")
    assert (stopped.status, stopped.reason) == (RunStatus.STOPPED, "asked to")
    assert stopped.ended_at is not None
    assert store.runs.get(run.run_id) == stopped
    assert store.runs.set_status(run.run_id, RunStatus.RUNNING) == run


def test_an_unknown_run_is_not_found(store: Store) -> None:
    for ask in (store.runs.get, store.rounds.of_run, lambda name: store.runs.set_status(name, RunStatus.FAILED)):
        with pytest.raises(NotFoundError):
            ask("run-0007")
    with pytest.raises(NotFoundError):
        store.rounds.open("run-0007", 1, Cohort(1, COHORT))


# --- rounds ---


def test_a_retried_round_keeps_its_recorded_cohort(store: Store, run: Run) -> None:
    first = store.rounds.open(run.run_id, 1, Cohort(1, ("c", "a", "b")))
    again = store.rounds.open(run.run_id, 1, Cohort(1, ("x", "y")))
    assert again == first
    assert first.cohort == ("c", "a", "b")
    assert (first.committed, first.version, first.loss) == (False, None, None)


@pytest.mark.parametrize("index", [-1, 0, 2, 3, 5])
def test_only_the_next_round_can_be_opened(store: Store, run: Run, index: int) -> None:
    commit(store, run, 3)
    with pytest.raises(ConflictError):
        store.rounds.open(run.run_id, index, Cohort(index, COHORT))
    assert len(store.rounds.of_run(run.run_id)) == 3


def test_a_cohort_drawn_for_another_round_is_refused(store: Store, run: Run) -> None:
    with pytest.raises(ConflictError):
        store.rounds.open(run.run_id, 1, Cohort(2, COHORT))
    assert store.rounds.of_run(run.run_id) == []


def test_a_commit_writes_everything(store: Store, run: Run) -> None:
    (version,) = commit(store, run, 1)
    assert (version.version, version.run_id, version.round_index) == ("v1.1.1", run.run_id, 1)
    assert (version.weights_digest, version.frozen_digest, version.epsilon) == ("1" * 64, "2" * 64, 0.5)
    assert (version.metrics, version.lineage, version.released) == (COMMIT.metrics, COMMIT.lineage, False)
    assert store.versions.get("v1.1.1") == store.versions.latest() == version
    assert store.runs.get(run.run_id).rounds_done == 1
    record = store.rounds.get(run.run_id, 1)
    assert (record.committed, record.version, record.num_updates) == (True, "v1.1.1", 2)
    assert (record.loss, record.accuracy, record.epsilon, record.duration_s) == (1.25, 0.75, 0.5, 2.5)


def test_a_round_is_committed_once(store: Store, run: Run) -> None:
    commit(store, run, 1)
    before = store.rounds.get(run.run_id, 1), store.versions.all(), store.runs.get(run.run_id)
    with pytest.raises(ConflictError):
        store.rounds.commit(run.run_id, 1, replace(COMMIT, loss=9.0))
    assert (store.rounds.get(run.run_id, 1), store.versions.all(), store.runs.get(run.run_id)) == before


def test_a_round_that_was_not_opened_cannot_be_committed(store: Store, run: Run) -> None:
    with pytest.raises(NotFoundError):
        store.rounds.commit(run.run_id, 1, COMMIT)
    with pytest.raises(NotFoundError):
        store.rounds.get(run.run_id, 1)


@pytest.mark.parametrize(("names", "fault"), [("aba", "counts twice"), ("abz", "'z' is not in the cohort")])
def test_no_update_counts_twice_or_comes_from_a_stranger(store: Store, run: Run, names: str, fault: str) -> None:
    store.rounds.open(run.run_id, 1, Cohort(1, COHORT))
    outcomes = tuple(ClientOutcome(name, 1) for name in names)
    with pytest.raises(ConflictError, match=fault):
        store.rounds.commit(run.run_id, 1, replace(COMMIT, outcomes=outcomes))
    assert store.runs.get(run.run_id).rounds_done == 0


def test_a_late_outcome_belongs_to_the_cohort_that_it_started_in(store: Store, run: Run) -> None:
    fast = replace(COMMIT, outcomes=(ClientOutcome("a", 1), ClientOutcome("b", 1)))
    store.rounds.open(run.run_id, 1, Cohort(1, COHORT))
    store.rounds.commit(run.run_id, 1, fast)
    store.rounds.open(run.run_id, 2, Cohort(2, ("a", "b")))
    store.rounds.commit(run.run_id, 2, fast)
    store.rounds.open(run.run_id, 3, Cohort(3, ("a",)))
    store.rounds.commit(run.run_id, 3, replace(COMMIT, outcomes=(ClientOutcome("c", 1, staleness=2),)))
    assert [record.num_updates for record in store.rounds.of_run(run.run_id)] == [2, 2, 1]
    assert store.rounds.get(run.run_id, 3).cohort == ("a",)


@pytest.mark.parametrize(
    ("name", "staleness", "fault"),
    [
        ("c", 0, "'c' is not in the cohort of round 3"),
        ("z", 2, "'z' is not in the cohort of round 1"),
        ("c", 1, "'c' is not in the cohort of round 2"),
        ("a", 2, "'a' counts twice in round 1"),
        ("b", 1, "'b' counts twice in round 2"),
        ("c", 3, "'c' is not in the cohort of round 0"),
        ("a", -1, "'a' is not in the cohort of round 4"),
    ],
)
def test_a_late_outcome_of_a_stranger_or_one_answered_since_is_refused(
    store: Store, run: Run, name: str, staleness: int, fault: str
) -> None:
    fast = replace(COMMIT, outcomes=(ClientOutcome("a", 1), ClientOutcome("b", 1)))
    for index, cohort in ((1, COHORT), (2, ("a", "b"))):
        store.rounds.open(run.run_id, index, Cohort(index, cohort))
        store.rounds.commit(run.run_id, index, fast)
    store.rounds.open(run.run_id, 3, Cohort(3, ("a", "b")))
    with pytest.raises(ConflictError, match=fault):
        store.rounds.commit(run.run_id, 3, replace(COMMIT, outcomes=(ClientOutcome(name, 1, staleness=staleness),)))
    assert store.runs.get(run.run_id).rounds_done == 2


def test_a_round_opened_for_nobody_may_be_drawn_again(store: Store, run: Run) -> None:
    assert store.rounds.open(run.run_id, 1, Cohort(1, ())).cohort == ()
    assert store.rounds.open(run.run_id, 1, Cohort(1, ("a",))).cohort == ("a",)
    assert store.rounds.open(run.run_id, 1, Cohort(1, ("b",))).cohort == ("a",)


def test_a_commit_that_breaks_off_leaves_nothing(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = store.rounds.open(run.run_id, 1, Cohort(1, COHORT))

    def insert_then_die(*arguments: Any) -> None:
        insert_version(*arguments)
        raise RuntimeError("the process died")

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "insert_version", insert_then_die)
        with pytest.raises(RuntimeError):
            store.rounds.commit(run.run_id, 1, COMMIT)
    assert store.rounds.get(run.run_id, 1) == opened
    assert store.runs.get(run.run_id) == run
    assert store.versions.all() == []
    # The retry writes the same keys, so that a half of the first attempt would collide with it.
    assert store.rounds.commit(run.run_id, 1, COMMIT).version == "v1.1.1"


def test_numbers_that_are_not_finite_are_absent_and_do_not_stop_a_commit(store: Store, run: Run) -> None:
    store.rounds.open(run.run_id, 1, Cohort(1, COHORT))
    bad = replace(COMMIT, loss=math.nan, accuracy=None, metrics={"loss": math.inf, "accuracy": 0.5}, outcomes=())
    assert store.rounds.commit(run.run_id, 1, bad).metrics == {"accuracy": 0.5}
    record = store.rounds.get(run.run_id, 1)
    assert (record.loss, record.accuracy, record.num_updates) == (None, None, 0)


# --- versions ---


def test_versions_are_ordered_as_numbers_and_never_reused(store: Store, run: Run) -> None:
    commit(store, run, 11)
    store.runs.set_status(run.run_id, RunStatus.COMPLETED)
    second = new_run(store)
    commit(store, second, 2)
    names = [version.version for version in store.versions.all()]
    assert names == ["v1.2.2", "v1.2.1", "v1.1.11", "v1.1.10", "v1.1.9", *(f"v1.1.{n}" for n in range(8, 0, -1))]
    assert [version.version for version in store.versions.all(offset=2, limit=3)] == ["v1.1.11", "v1.1.10", "v1.1.9"]
    newest = [store.versions.latest(name) for name in (None, "run-0001", "run-0002", "run-0003")]
    assert [version and version.version for version in newest] == ["v1.2.2", "v1.1.11", "v1.2.2", None]


def test_an_unknown_version_is_not_found(store: Store) -> None:
    with pytest.raises(NotFoundError):
        store.versions.get("v1.9.9")
    with pytest.raises(NotFoundError):
        store.releases.add("v1.9.9", {"standard": "a" * 64}, {}, "no such thing")


# --- releases ---


def test_a_release_is_a_step_with_its_artifacts(store: Store, run: Run) -> None:
    commit(store, run, 1)
    assert (store.releases.current(), store.releases.next_sequence()) == (None, 1)
    release = store.releases.add("v1.1.1", {"standard": "a" * 64}, {"standard": "{}"}, "round 1")
    assert (release.sequence, release.version, release.reason) == (1, "v1.1.1", "round 1")
    assert (release.artifacts, release.envelopes) == ({"standard": "a" * 64}, {"standard": "{}"})
    assert store.releases.current() == release
    assert store.versions.get("v1.1.1").released
    assert store.releases.next_sequence() == 2


def test_releasing_the_current_version_again_is_harmless(store: Store, run: Run) -> None:
    commit(store, run, 1)
    first = store.releases.add("v1.1.1", {"standard": "a" * 64}, {"standard": "{}"}, "round 1")
    assert store.releases.add("v1.1.1", {"standard": "a" * 64}, {"standard": "{ }"}, "retry", sequence=2) == first
    assert store.releases.all() == [first]


def test_a_roll_back_and_other_artifacts_are_new_steps(store: Store, run: Run) -> None:
    commit(store, run, 2)
    steps = [("v1.1.1", "a"), ("v1.1.2", "b"), ("v1.1.1", "a"), ("v1.1.1", "c")]
    for version, letter in steps:
        store.releases.add(version, {"standard": letter * 64}, {}, "because")
    assert [release.sequence for release in store.releases.all()] == [1, 2, 3, 4]
    assert [(release.version, release.artifacts["standard"][0]) for release in store.releases.all()] == steps
    assert store.versions.get("v1.1.1").artifacts == {"standard": "c" * 64}


def test_a_release_without_artifacts_or_under_a_taken_number_is_refused(store: Store, run: Run) -> None:
    commit(store, run, 2)
    store.releases.add("v1.1.1", {"standard": "a" * 64}, {}, "first", sequence=1)
    with pytest.raises(ConflictError):
        store.releases.add("v1.1.2", {}, {}, "nothing")
    with pytest.raises(ConflictError):
        store.releases.add("v1.1.2", {"standard": "b" * 64}, {}, "late", sequence=1)
    assert len(store.releases.all()) == 1
    assert not store.versions.get("v1.1.2").released
