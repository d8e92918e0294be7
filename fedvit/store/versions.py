"""Model versions: trained by a round, or derived from an older version."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedvit.store.records import Derivation, RoundCommit
from fedvit.store.repository import Repository, get_row, insert_row, next_number, record_of
from fedvit.store.tables import ReleaseRow, RunRow, VersionRow
from fedvit.types import ModelVersion

RULE_STATE = "rule_state"
"""The key of a version's lineage with the blob of the aggregation rule's state, if the rule has one."""
_NEWEST_FIRST = (VersionRow.run_ordinal.desc(), VersionRow.number.desc())


class Versions(Repository):
    """The model versions. A round inserts its version with :meth:`fedvit.store.rounds.Rounds.commit`."""

    def get(self, version: str) -> ModelVersion:
        """One model version.

        Raises:
            NotFoundError: no such version.
        """
        return self._get(ModelVersion, VersionRow, version)

    def all(self, offset: int = 0, limit: int | None = None) -> list[ModelVersion]:
        """Model versions, newest first: v1.1.10 before v1.1.9."""
        query = select(VersionRow).order_by(*_NEWEST_FIRST).offset(offset).limit(limit)
        return self._records(ModelVersion, query)

    def latest(self, run_id: str | None = None) -> ModelVersion | None:
        """The newest version that one run trained, or the newest of all; None before the first."""
        query = select(VersionRow).order_by(*_NEWEST_FIRST)
        if run_id is not None:
            query = query.where(VersionRow.run_id == run_id, VersionRow.derived_from.is_(None))
        return self._first(ModelVersion, query)

    def derive(self, derivation: Derivation) -> ModelVersion:
        """Insert a version above all others with the weights of an older one.

        Raises:
            NotFoundError: no such origin.
        """
        with self._write() as session:
            origin = get_row(session, VersionRow, derivation.origin)
            newest = session.scalars(select(VersionRow).order_by(*_NEWEST_FIRST).limit(1)).one()
            return _insert(
                session,
                run_id=origin.run_id,
                round_index=origin.round_index,
                run_ordinal=newest.run_ordinal,
                number=newest.number + 1,
                weights_digest=origin.weights_digest,
                frozen_digest=origin.frozen_digest,
                created_at=self._now(),
                epsilon=origin.epsilon,
                metrics=derivation.metrics,
                lineage={**origin.lineage, **derivation.lineage},
                derived_from=origin.version,
            )

    def refuse(self, version: str, reason: str) -> ModelVersion:
        """Record why a version is not offered to replicas and vehicles.

        Raises:
            NotFoundError: no such version.
        """
        with self._write() as session:
            row = get_row(session, VersionRow, version)
            row.refusal = reason
            return record_of(ModelVersion, row)

    def blob_digests(self) -> set[str]:
        """Every blob that a version or a release names."""
        columns = (VersionRow.weights_digest, VersionRow.frozen_digest, VersionRow.artifacts)
        with self._read() as session:
            digests = set(session.scalars(select(VersionRow.lineage[RULE_STATE].as_string())).all()) - {None}
            for row in session.execute(select(*columns)):
                digests |= {row.weights_digest, row.frozen_digest, *row.artifacts.values()}
            return digests.union(*(artifacts.values() for artifacts in session.scalars(select(ReleaseRow.artifacts))))


def insert_version(session: Session, run: RunRow, round_index: int, commit: RoundCommit, at: datetime) -> ModelVersion:
    """Insert the next version of a run: ``v1.<run ordinal>.<n>``."""
    return _insert(
        session,
        run_id=run.run_id,
        round_index=round_index,
        run_ordinal=run.ordinal,
        number=next_number(session, VersionRow.number, VersionRow.run_ordinal == run.ordinal),
        weights_digest=commit.weights_digest,
        frozen_digest=commit.frozen_digest,
        created_at=at,
        epsilon=commit.epsilon,
        metrics=commit.metrics,
        lineage=dict(commit.lineage),
    )


def _insert(
    session: Session, *, run_ordinal: int, number: int, metrics: Mapping[str, float], **columns: Any
) -> ModelVersion:
    name = f"v1.{run_ordinal}.{number}"
    finite = {metric: value for metric, value in metrics.items() if math.isfinite(value)}
    row = VersionRow(version=name, run_ordinal=run_ordinal, number=number, metrics=finite, artifacts={}, **columns)
    return record_of(ModelVersion, insert_row(session, row))
