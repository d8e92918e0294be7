"""Model versions, trained by a round or derived from an older version, and the sequence of their releases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError
from fedvit.store.ledger import Ledger
from fedvit.store.metadata import RELEASE_FLOOR_KEY, get_value, set_value
from fedvit.store.records import Derivation, Release, RoundCommit
from fedvit.store.repository import Repository, columns_of, get_row, insert_row, next_number, record_of
from fedvit.store.tables import ReleaseRow, RunRow, VersionRow
from fedvit.types import ModelVersion

RULE_STATE = "rule_state"
"""The key of a version's lineage with the blob of the aggregation rule's state, if the rule has one."""
RELEASE_MARGIN = 10_000
"""More releases than anybody makes between a backup and the loss of its original."""
_NEWEST_FIRST = (VersionRow.run_ordinal.desc(), VersionRow.number.desc())
_LAST_RELEASE_FIRST = select(ReleaseRow).order_by(ReleaseRow.sequence.desc())


class Versions(Repository):
    """The model versions. A round inserts its version with :meth:`fedvit.store.rounds.Rounds.commit`."""

    def get(self, version: str) -> ModelVersion:
        """One model version; raises NotFoundError where there is none."""
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


class Releases(Repository):
    """The sequence of releases. Rows are never deleted, so no number is given twice."""

    def add(
        self,
        version: str,
        artifacts: Mapping[str, str],
        envelopes: Mapping[str, str],
        reason: str,
        *,
        sequence: int | None = None,
        serve_variant: str | None = None,
        while_frozen: bool = False,
    ) -> Release:
        """Offer a version to replicas and vehicles; harmless when it is the current one with the same artifacts.

        Args:
            version: a committed version; an older one is a roll-back.
            artifacts, envelopes: variant -> digest of its blob, and signed manifest, JSON text.
            reason: why, for the history.
            sequence: the number that the manifests were signed under, to be sure that no other release took it.
            serve_variant: what the fleet runs from now on; None leaves it on the variant that it runs.
            while_frozen: release also while the ledger is frozen, as a roll-back or a switch of variants may.

        Raises:
            NotFoundError: no such version.
            ConflictError: there are no artifacts, or ``sequence`` is no longer the next number.
            LedgerFrozenError: an incident froze the ledger.
        """
        with self._sessions.transaction() as transaction, transaction.write() as session:
            if not while_frozen:
                Ledger(transaction).check_not_frozen()
            row = get_row(session, VersionRow, version)
            if not artifacts:
                cure = "Export at least one variant."
                raise ConflictError(f"Version {version} was released without artifacts.", cure=cure)
            current = session.scalar(_LAST_RELEASE_FIRST.limit(1))
            if current is not None:
                serve_variant = serve_variant or current.serve_variant
                offered = (version, dict(artifacts), serve_variant)
                if (current.version, current.artifacts, current.serve_variant) == offered:
                    return record_of(Release, current)
            free = next_sequence(session)
            if sequence not in (None, free):
                raise ConflictError(
                    f"Release {sequence} of version {version} comes too late: the next one is {free}.",
                    cure="Sign the manifests again under that number.",
                )
            row.artifacts, row.refusal = dict(artifacts), None
            release = Release(free, version, dict(artifacts), dict(envelopes), self._now(), reason, serve_variant)
            insert_row(session, ReleaseRow(**columns_of(release)))
            return release

    def current(self) -> Release | None:
        """The release that replicas and vehicles run now, or None."""
        return self._first(Release, _LAST_RELEASE_FIRST)

    def of_version(self, version: str) -> Release | None:
        """The last release of a version, or None."""
        return self._first(Release, _LAST_RELEASE_FIRST.where(ReleaseRow.version == version))

    def all(self) -> list[Release]:
        """All releases, oldest first."""
        return self._records(Release, select(ReleaseRow).order_by(ReleaseRow.sequence))

    def next_sequence(self) -> int:
        """The number that the next release gets, from 1."""
        with self._read() as session:
            return next_sequence(session)

    def reserve(self, count: int) -> None:
        """Leave out ``count`` numbers, which the original of a copied state may give meanwhile.

        Vehicles follow no number below one that they have seen.
        """
        with self._write() as session:
            set_value(session, RELEASE_FLOOR_KEY, next_sequence(session) - 1 + count)


def next_sequence(session: Session) -> int:
    """The number that the next release gets."""
    last = session.scalar(select(func.max(ReleaseRow.sequence))) or 0
    return 1 + max(last, get_value(session, RELEASE_FLOOR_KEY) or 0)
