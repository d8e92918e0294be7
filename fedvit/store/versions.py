"""Model versions: trained by a round, or derived from an older version."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.errors import NotFoundError
from fedvit.store.database import Repository
from fedvit.store.records import Derivation, RoundCommit
from fedvit.store.tables import ReleaseRow, RunRow, VersionRow, record_of
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
        with self._read() as session:
            return record_of(ModelVersion, version_row(session, version))

    def all(self, offset: int = 0, limit: int | None = None) -> list[ModelVersion]:
        """Model versions, newest first: v1.1.10 before v1.1.9."""
        query = select(VersionRow).order_by(*_NEWEST_FIRST).offset(offset).limit(limit)
        with self._read() as session:
            return [record_of(ModelVersion, row) for row in session.scalars(query)]

    def latest(self, run_id: str | None = None) -> ModelVersion | None:
        """The newest version that one run trained, or the newest of all; None before the first."""
        query = select(VersionRow).order_by(*_NEWEST_FIRST).limit(1)
        if run_id is not None:
            query = query.where(VersionRow.run_id == run_id, VersionRow.derived_from.is_(None))
        with self._read() as session:
            row = session.scalar(query)
            return None if row is None else record_of(ModelVersion, row)

    def derive(self, derivation: Derivation) -> ModelVersion:
        """Insert a version above all others with the weights of an older one.

        Raises:
            NotFoundError: no such origin.
        """
        with self._write() as session:
            origin = version_row(session, derivation.origin)
            newest = session.scalars(select(VersionRow).order_by(*_NEWEST_FIRST).limit(1)).one()
            row = VersionRow(
                version=f"v1.{newest.run_ordinal}.{newest.number + 1}",
                run_id=origin.run_id,
                round_index=origin.round_index,
                run_ordinal=newest.run_ordinal,
                number=newest.number + 1,
                weights_digest=origin.weights_digest,
                frozen_digest=origin.frozen_digest,
                created_at=self._now(),
                epsilon=origin.epsilon,
                metrics=_finite(derivation.metrics),
                lineage={**origin.lineage, **derivation.lineage},
                artifacts={},
                derived_from=origin.version,
            )
            session.add(row)
            session.flush()
            return record_of(ModelVersion, row)

    def refuse(self, version: str, reason: str) -> ModelVersion:
        """Record why a version is not offered to replicas and vehicles.

        Raises:
            NotFoundError: no such version.
        """
        with self._write() as session:
            row = version_row(session, version)
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
    newest = session.scalar(select(func.max(VersionRow.number)).where(VersionRow.run_ordinal == run.ordinal))
    number = 1 + (newest or 0)
    row = VersionRow(
        version=f"v1.{run.ordinal}.{number}",
        run_id=run.run_id,
        round_index=round_index,
        run_ordinal=run.ordinal,
        number=number,
        weights_digest=commit.weights_digest,
        frozen_digest=commit.frozen_digest,
        created_at=at,
        epsilon=commit.epsilon,
        metrics=_finite(commit.metrics),
        lineage=dict(commit.lineage),
        artifacts={},
    )
    session.add(row)
    session.flush()
    return record_of(ModelVersion, row)


def version_row(session: Session, version: str) -> VersionRow:
    """The row of one version.

    Raises:
        NotFoundError: no such version.
    """
    row = session.get(VersionRow, version)
    if row is None:
        raise NotFoundError(f"There is no model version {version!r}.", cure="Versions are named like v1.1.30.")
    return row


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
