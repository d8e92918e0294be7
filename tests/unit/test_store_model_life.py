"""Derived versions and what the fleet runs, in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError as ConstraintError
from sqlalchemy.exc import InvalidRequestError

from fedvit.errors import ConflictError, NotFoundError
from fedvit.store.database import make_engine
from fedvit.store.records import Derivation, Release, RoundCommit
from fedvit.store.store import Repositories, Store
from fedvit.types import Client, ClientKind, ClientOutcome, Cohort, ModelVersion, utc_now

ARTIFACTS = {"standard": "a" * 64}


def trained(store: Store, rounds: int = 3) -> str:
    """A run of so many rounds, each released; its name."""
    run = store.runs.create(
        rounds_total=9, noise_multiplier=1.0, config={}, config_digest="c" * 64, data_digest="d" * 64
    )
    for index in range(1, rounds + 1):
        commit_and_release(store, run.run_id, index)
    return run.run_id


def commit_and_release(store: Store, run_id: str, index: int) -> ModelVersion:
    store.rounds.open(run_id, index, Cohort(index, ("a",)))
    commit = RoundCommit(f"{index}" * 64, "f" * 64, 1.0, 0.5, 0.9, {}, {"n": index}, (ClientOutcome("a", 1),), 1.0)
    version = store.rounds.commit(run_id, index, commit)
    store.releases.add(version.version, {"standard": f"{index}" * 64}, {"standard": "{}"}, "trained")
    return version


def sign(version: ModelVersion, sequence: int) -> dict[str, str]:
    return {"standard": f"{version.version} as {sequence}"}


def release_derived(
    store: Store,
    derivation: Derivation,
    reason: str,
    serve_variant: str | None,
    *,
    sign: Callable[[ModelVersion, int], dict[str, str]] = sign,
    artifacts: Mapping[str, str] = ARTIFACTS,
) -> Release:
    """Derive, sign and release a version in one transaction."""
    with store.transaction() as transaction:
        version, sequence = transaction.versions.derive(derivation), transaction.releases.next_sequence()
        return transaction.releases.add(
            version.version,
            artifacts,
            sign(version, sequence),
            reason,
            sequence=sequence,
            serve_variant=serve_variant,
            while_frozen=True,
        )


def test_a_derived_version_is_above_all_others_and_beside_the_trained_one(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        run_id = trained(store)
        result = release_derived(store, Derivation("v1.1.1", {"why": "x"}, {"accuracy": 0.7}), "back", "s")
        assert (result.version, result.sequence, result.serve_variant) == ("v1.1.4", 4, "s")
        assert result.envelopes == {"standard": "v1.1.4 as 4"}
        version, origin = store.versions.get("v1.1.4"), store.versions.get("v1.1.1")
        assert (version.derived_from, version.weights_digest) == ("v1.1.1", origin.weights_digest)
        assert (version.lineage, version.metrics) == ({"n": 1, "why": "x"}, {"accuracy": 0.7})
        assert store.versions.latest() == version
        assert store.versions.latest(run_id) == store.versions.get("v1.1.3")
        assert [r.version for r in store.rounds.of_run(run_id)] == ["v1.1.1", "v1.1.2", "v1.1.3"]
        assert commit_and_release(store, run_id, 4).version == "v1.1.5"


def test_a_signer_that_fails_leaves_no_version_behind(tmp_path: Path) -> None:
    def broken(version: ModelVersion, sequence: int) -> dict[str, str]:
        raise ConflictError("no key")

    with Store.open(tmp_path) as store:
        trained(store)
        before = store.versions.all()
        with pytest.raises(ConflictError):
            release_derived(store, Derivation("v1.1.1", {}, {}), "back", None, sign=broken)
        with pytest.raises(ConflictError):
            release_derived(store, Derivation("v1.1.1", {}, {}), "back", None, artifacts={})
        with pytest.raises(NotFoundError):
            release_derived(store, Derivation("v7.7.7", {}, {}), "back", None)
        assert store.versions.all() == before
        assert store.releases.next_sequence() == 4


def test_the_fleet_s_variant_stays_until_it_is_changed(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        run_id = trained(store, 1)
        current = store.releases.current()
        assert current is not None
        envelopes = {"standard": "v1.1.1 as 2"}
        switched = store.releases.add("v1.1.1", current.artifacts, envelopes, "switch", serve_variant="light")
        assert (switched.version, switched.sequence, switched.serve_variant) == ("v1.1.1", 2, "light")
        commit_and_release(store, run_id, 2)
        assert [r.serve_variant for r in store.releases.all()] == [None, "light", "light"]
        assert store.releases.of_version("v1.1.1") == switched
        assert store.releases.of_version("v1.1.9") is None


def test_a_refusal_is_kept_until_the_version_is_released_after_all(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        trained(store, 2)
        assert store.versions.refuse("v1.1.2", "too bad").refusal == "too bad"
        release_derived(store, Derivation("v1.1.2", {}, {}), "forced", None)
        assert store.versions.get("v1.1.2").refusal == "too bad"
        assert store.versions.get("v1.1.3").refusal is None
        with pytest.raises(NotFoundError):
            store.versions.refuse("v7.7.7", "x")


def register_and_fail(transaction: Repositories) -> None:
    transaction.metadata.set("count", 7)
    transaction.clients.register([Client("a", ClientKind.VIRTUAL, 1)])
    assert transaction.clients.quarantine(["a"], "x", utc_now()) == ["a"]
    transaction.runs.get("run-7777")


def test_a_transaction_reads_its_own_writes_and_is_committed_whole_or_not_at_all(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        for count in (1, 2, 3):
            with store.transaction() as transaction:
                transaction.metadata.set("count", 1 + (transaction.metadata.get("count") or 0))
                assert transaction.metadata.get("count") == count
                assert store.metadata.get("count") == (count - 1 or None)
        with pytest.raises(NotFoundError), store.transaction() as transaction:
            register_and_fail(transaction)
        assert (store.metadata.get("count"), store.clients.population()) == (3, 0)
        with pytest.raises(InvalidRequestError):
            transaction.metadata.get("count")


def test_a_transaction_reads_what_was_written_in_bulk_inside_it(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, store.transaction() as transaction:
        transaction.clients.register([Client("a", ClientKind.VIRTUAL, 1)])
        assert transaction.clients.get("a").last_seen_at is None
        now = utc_now()
        transaction.clients.set_last_seen({"a": now})
        transaction.clients.register([Client("a", ClientKind.VIRTUAL, 5)])
        assert (transaction.clients.get("a").last_seen_at, transaction.clients.get("a").num_examples) == (now, 5)


def test_a_round_has_one_trained_version(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        trained(store, 2)
    engine = make_engine(tmp_path / "state.db")
    copy = "INSERT INTO model_versions SELECT 'v1.1.9', run_id, round_index, run_ordinal, 9, weights_digest, "
    copy += "frozen_digest, created_at, epsilon, metrics, lineage, artifacts, NULL, NULL FROM model_versions LIMIT 1"
    with pytest.raises(ConstraintError), engine.begin() as connection:
        connection.execute(text(copy))
    engine.dispose()
