"""Derived versions and what the fleet runs, in the store; and how an older state comes to know of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError as ConstraintError

from fedvit.errors import ConflictError, NotFoundError
from fedvit.store.database import make_engine, migration_config
from fedvit.store.store import Derivation, RoundCommit, Sign, Store
from fedvit.types import ClientOutcome, Cohort, ModelVersion

ARTIFACTS = {"standard": "a" * 64}


def trained(store: Store, rounds: int = 3) -> str:
    """A run of so many rounds, each released; its name."""
    run = store.create_run(
        rounds_total=9, noise_multiplier=1.0, config={}, config_digest="c" * 64, data_digest="d" * 64
    )
    for index in range(1, rounds + 1):
        commit_and_release(store, run.run_id, index)
    return run.run_id


def commit_and_release(store: Store, run_id: str, index: int) -> ModelVersion:
    store.open_round(run_id, index, Cohort(index, ("a",)))
    commit = RoundCommit(f"{index}" * 64, "f" * 64, 1.0, 0.5, 0.9, {}, {"n": index}, (ClientOutcome("a", 1),), 1.0)
    version = store.commit_round(run_id, index, commit)
    store.release(version.version, {"standard": f"{index}" * 64}, {"standard": "{}"}, "trained")
    return version


def sign(version: ModelVersion, sequence: int) -> dict[str, str]:
    return {"standard": f"{version.version} as {sequence}"}


def test_a_derived_version_is_above_all_others_and_beside_the_trained_one(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        run_id = trained(store)
        made = store.release_derived(
            Derivation("v1.1.1", {"why": "x"}, ARTIFACTS, {"accuracy": 0.7}), sign, "back", "s"
        )
        assert (made.version, made.sequence, made.serve_variant) == ("v1.1.4", 4, "s")
        assert made.envelopes == {"standard": "v1.1.4 as 4"}
        version, origin = store.version("v1.1.4"), store.version("v1.1.1")
        assert (version.derived_from, version.weights_digest) == ("v1.1.1", origin.weights_digest)
        assert (version.lineage, version.metrics) == ({"n": 1, "why": "x"}, {"accuracy": 0.7})
        assert store.latest_version() == version
        assert store.latest_version(run_id) == store.version("v1.1.3")
        assert [r.version for r in store.rounds(run_id)] == ["v1.1.1", "v1.1.2", "v1.1.3"]
        assert commit_and_release(store, run_id, 4).version == "v1.1.5"


def test_a_signer_that_fails_leaves_no_version_behind(tmp_path: Path) -> None:
    def broken(version: ModelVersion, sequence: int) -> dict[str, str]:
        raise ConflictError("no key")

    with Store.open(tmp_path) as store:
        trained(store)
        before = store.versions()
        refused: list[tuple[Derivation, Sign, type[Exception]]] = [
            (Derivation("v1.1.1", {}, ARTIFACTS, {}), broken, ConflictError),
            (Derivation("v1.1.1", {}, {}, {}), sign, ConflictError),
            (Derivation("v7.7.7", {}, ARTIFACTS, {}), sign, NotFoundError),
        ]
        for derivation, signer, error in refused:
            with pytest.raises(error):
                store.release_derived(derivation, signer, "back", None)
        assert store.versions() == before
        assert store.next_release_sequence() == 4


def test_the_fleet_s_variant_stays_until_it_is_changed(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        with pytest.raises(ConflictError, match="released yet"):
            store.release_again("light", sign, "switch")
        run_id = trained(store, 1)
        switched = store.release_again("light", sign, "switch")
        assert (switched.version, switched.sequence, switched.serve_variant) == ("v1.1.1", 2, "light")
        commit_and_release(store, run_id, 2)
        assert [r.serve_variant for r in store.releases()] == [None, "light", "light"]
        assert store.release_of("v1.1.1") == switched
        assert store.release_of("v1.1.9") is None


def test_a_refusal_is_kept_until_the_version_is_released_after_all(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        trained(store, 2)
        assert store.refuse_release("v1.1.2", "too bad").refusal == "too bad"
        store.release_derived(Derivation("v1.1.2", {}, ARTIFACTS, {}), sign, "forced", None)
        assert store.version("v1.1.2").refusal == "too bad"
        assert store.version("v1.1.3").refusal is None
        with pytest.raises(NotFoundError):
            store.refuse_release("v7.7.7", "x")


def test_a_change_of_meta_sees_what_is_there_and_may_refuse(tmp_path: Path) -> None:
    def refuse(_: object) -> object:
        raise ConflictError("no")

    with Store.open(tmp_path) as store:
        assert [store.change_meta("count", lambda n: 1 + (n or 0)) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(ConflictError):
            store.change_meta("count", refuse)
        assert store.get_meta("count") == 3


def test_an_older_state_is_migrated_with_all_it_holds_and_back(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        trained(store, 2)
        before = store.versions(), store.releases()
        store.release_derived(Derivation("v1.1.1", {}, ARTIFACTS, {}), sign, "back", "light")
    migrate = {"downgrade": command.downgrade, "upgrade": command.upgrade}
    for direction, revision in (("downgrade", "0001"), ("upgrade", "head")):
        engine = make_engine(tmp_path / "state.db", foreign_keys=False)
        with engine.begin() as connection:
            config = migration_config()
            config.attributes["connection"] = connection
            migrate[direction](config, revision)
        engine.dispose()
        if direction == "downgrade":
            _check_one_version_a_round(tmp_path)
    with Store.open(tmp_path) as store:
        assert (store.versions(), store.releases()) == before


def _check_one_version_a_round(home: Path) -> None:
    engine = make_engine(home / "state.db")
    copy = "INSERT INTO model_versions SELECT 'v1.1.9', run_id, round_index, run_ordinal, 9, weights_digest, "
    copy += "frozen_digest, created_at, epsilon, metrics, lineage, artifacts FROM model_versions LIMIT 1"
    with pytest.raises(ConstraintError), engine.begin() as connection:
        connection.execute(text(copy))
    engine.dispose()
