"""Which clients contributed to a version, through rounds, runs and derivations, and whether they can be told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedvit.registry.contributions import contributions, versions_of_secure_sums
from fedvit.store.records import Derivation, RoundCommit
from fedvit.store.store import Store
from fedvit.types import ClientOutcome, Cohort, RunStatus

FACTS: Any = {"rounds_total": 9, "noise_multiplier": 1.0, "config_digest": "c", "data_digest": "d"}


def commit(store: Store, run_id: str, round_index: int, clients: list[str], base: str | None = None) -> str:
    store.rounds.open(run_id, round_index, Cohort(round_index, tuple(clients)))
    return store.rounds.commit(
        run_id,
        round_index,
        RoundCommit(
            weights_digest=f"{round_index}" * 64,
            frozen_digest="f" * 64,
            epsilon=1.0,
            loss=None,
            accuracy=None,
            metrics={},
            lineage={"clients": clients, "base_version": base},
            outcomes=tuple(ClientOutcome(client, 10) for client in clients),
            duration_s=1.0,
        ),
    ).version


def test_contributions_follow_rounds_runs_and_derivations(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:

        def begin() -> str:
            return store.runs.create(config={}, **FACTS).run_id

        first = begin()
        commit(store, first, 1, ["a"])
        commit(store, first, 2, ["b"])
        commit(store, first, 3, ["c"])
        store.runs.set_status(first, RunStatus.COMPLETED)
        derived = store.versions.derive(Derivation("v1.1.2", {"rollback_of": "v1.1.2"}, {}))
        store.releases.add(derived.version, {"standard": "x"}, {}, "back", while_frozen=True)
        tuned = begin()
        commit(store, tuned, 1, ["d"], base="v1.1.4")
        commit(store, tuned, 2, ["a"], base="v1.1.4")
        store.runs.set_status(tuned, RunStatus.COMPLETED)
        commit(store, begin(), 1, ["b"])
        results = {name: "".join(sorted(who)) for name, who in contributions(store.versions.all(), "abcd").items()}
        assert results == {
            **{"v1.1.1": "a", "v1.1.2": "ab", "v1.1.3": "abc", "v1.1.4": "ab"},
            **{"v1.2.1": "abd", "v1.2.2": "abd", "v1.3.1": "b"},
        }
        assert contributions(store.versions.all(), ["c"])["v1.1.3"] == {"c"}


def test_what_is_made_of_secure_sums_contains_them(tmp_path: Path) -> None:
    with Store.open(tmp_path / "other") as store:

        def begin(privacy: dict[str, str]) -> str:
            run = store.runs.create(config={"privacy": privacy}, **FACTS)
            return run.run_id

        plain = begin({})
        commit(store, plain, 1, ["a"])
        store.runs.set_status(plain, RunStatus.COMPLETED)
        secure = begin({"noise_at": "distributed"})
        commit(store, secure, 1, ["a"])
        assert store.versions.derive(Derivation("v1.1.1", {}, {})).version == "v1.2.2"
        store.runs.set_status(secure, RunStatus.COMPLETED)
        tuned = begin({"noise_at": "client"})
        commit(store, tuned, 1, ["a"], base="v1.2.1")
        assert store.versions.derive(Derivation("v1.2.1", {}, {})).version == "v1.3.2"
        assert versions_of_secure_sums(store) == {"v1.2.1", "v1.3.1", "v1.3.2"}
