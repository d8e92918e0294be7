"""Model versions and the sequence of releases. Functions of an open session."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, NotFoundError
from fedvit.store.fleet import get_meta, set_meta
from fedvit.store.records import Derivation, Release, RoundCommit
from fedvit.store.tables import ReleaseRow, RunRow, VersionRow
from fedvit.types import ModelVersion, utc_now

Sign = Callable[[ModelVersion, int], Mapping[str, str]]
"""The envelope of each variant, for a version released under a sequence number."""
RELEASE_FLOOR_KEY = "release_floor"
"""Release numbers up to this one may be taken, by releases that a restored state knows nothing of."""
RELEASE_MARGIN = 10_000
"""More releases than anybody makes between a backup and the loss of its original."""
RULE_STATE = "rule_state"
"""Where a version's lineage names the blob of what the aggregation rule remembers, if it remembers anything."""
_NEWEST_FIRST = (VersionRow.run_ordinal.desc(), VersionRow.number.desc())


def insert_version(session: Session, owner: RunRow, round_index: int, commit: RoundCommit) -> ModelVersion:
    """Insert the next version of a run: ``v1.<run ordinal>.<n>``."""
    newest = session.scalar(select(func.max(VersionRow.number)).where(VersionRow.run_ordinal == owner.ordinal))
    number = 1 + (newest or 0)
    row = VersionRow(
        version=f"v1.{owner.ordinal}.{number}",
        run_id=owner.run_id,
        round_index=round_index,
        run_ordinal=owner.ordinal,
        number=number,
        weights_digest=commit.weights_digest,
        frozen_digest=commit.frozen_digest,
        created_at=utc_now(),
        epsilon=commit.epsilon,
        metrics=_finite(commit.metrics),
        lineage=dict(commit.lineage),
        artifacts={},
    )
    session.add(row)
    session.flush()
    return _to_version(row)


def version(session: Session, name: str) -> ModelVersion:
    """One version.

    Raises:
        NotFoundError: no such version.
    """
    return _to_version(_version_row(session, name))


def versions(session: Session, offset: int, limit: int | None) -> list[ModelVersion]:
    """Versions, newest first."""
    query = select(VersionRow).order_by(*_NEWEST_FIRST).offset(offset).limit(limit)
    return [_to_version(row) for row in session.scalars(query)]


def latest_version(session: Session, run_id: str | None) -> ModelVersion | None:
    """The newest version of all, or the newest one that a run trained: what was made from it does not count."""
    query = select(VersionRow).order_by(*_NEWEST_FIRST).limit(1)
    if run_id is not None:
        query = query.where(VersionRow.run_id == run_id, VersionRow.derived_from.is_(None))
    row = session.scalar(query)
    return None if row is None else _to_version(row)


def release(
    session: Session,
    name: str,
    artifacts: Mapping[str, str],
    envelopes: Mapping[str, str],
    reason: str,
    sequence: int | None,
    serve_variant: str | None,
) -> Release:
    """Append a release, or give back the current one when it already offers the same artifacts of the same version.

    Without a ``serve_variant`` the fleet stays on the one that it runs.

    Raises:
        NotFoundError: no such version.
        ConflictError: nothing to release, or ``sequence`` went to another release meanwhile.
    """
    row = _version_row(session, name)
    if not artifacts:
        raise ConflictError(f"Version {name} was released without artifacts.", cure="Export at least one variant.")
    current = _current_row(session)
    if serve_variant is None and current is not None:
        serve_variant = current.serve_variant
    offered = (name, dict(artifacts), serve_variant)
    if current is not None and (current.version, current.artifacts, current.serve_variant) == offered:
        return _to_release(current)
    free = next_release_sequence(session)
    if sequence not in (None, free):
        raise ConflictError(
            f"Release {sequence} of version {name} comes too late: the next one is {free}.",
            cure="Sign the manifests again under that number.",
        )
    return _append(session, row, free, artifacts, envelopes, reason, serve_variant)


def release_again(session: Session, serve_variant: str, sign: Sign, reason: str) -> Release:
    """The current release once more, under the next sequence number, with another variant for the fleet.

    Raises:
        ConflictError: nothing is released yet.
    """
    current = _current_row(session)
    if current is None:
        raise ConflictError("No model version is released yet.", cure="Train first.")
    row, free = _version_row(session, current.version), next_release_sequence(session)
    return _append(session, row, free, current.artifacts, sign(_to_version(row), free), reason, serve_variant)


def release_derived(
    session: Session, derivation: Derivation, sign: Sign, reason: str, serve_variant: str | None
) -> Release:
    """Insert a version above all others with an older one's weights, and release it.

    Raises:
        NotFoundError: no such origin.
        ConflictError: it has no artifacts.
    """
    if not derivation.artifacts:
        raise ConflictError(f"{derivation.origin} was released without artifacts.", cure="Export at least one variant.")
    row = _insert_derived(session, _version_row(session, derivation.origin), derivation)
    free = next_release_sequence(session)
    envelopes = sign(_to_version(row), free)
    return _append(session, row, free, derivation.artifacts, envelopes, reason, serve_variant)


def _insert_derived(session: Session, origin: VersionRow, derivation: Derivation) -> VersionRow:
    newest = session.scalars(select(VersionRow).order_by(*_NEWEST_FIRST).limit(1)).one()
    row = VersionRow(
        version=f"v1.{newest.run_ordinal}.{newest.number + 1}",
        run_id=origin.run_id,
        round_index=origin.round_index,
        run_ordinal=newest.run_ordinal,
        number=newest.number + 1,
        weights_digest=origin.weights_digest,
        frozen_digest=origin.frozen_digest,
        created_at=utc_now(),
        epsilon=origin.epsilon,
        metrics=_finite(derivation.metrics),
        lineage={**origin.lineage, **derivation.lineage},
        artifacts={},
        derived_from=origin.version,
    )
    session.add(row)
    session.flush()
    return row


def _append(
    session: Session,
    row: VersionRow,
    sequence: int,
    artifacts: Mapping[str, str],
    envelopes: Mapping[str, str],
    reason: str,
    serve_variant: str | None,
) -> Release:
    row.artifacts = dict(artifacts)
    row.refusal = None
    step = ReleaseRow(
        sequence=sequence,
        version=row.version,
        at=utc_now(),
        reason=reason,
        artifacts=dict(artifacts),
        envelopes=dict(envelopes),
        serve_variant=serve_variant,
    )
    session.add(step)
    session.flush()
    return _to_release(step)


def refuse_release(session: Session, name: str, reason: str) -> ModelVersion:
    """Record why a version is not offered.

    Raises:
        NotFoundError: no such version.
    """
    row = _version_row(session, name)
    row.refusal = reason
    return _to_version(row)


def release_of(session: Session, name: str) -> Release | None:
    """The last release of a version."""
    query = select(ReleaseRow).where(ReleaseRow.version == name).order_by(ReleaseRow.sequence.desc()).limit(1)
    row = session.scalar(query)
    return None if row is None else _to_release(row)


def next_release_sequence(session: Session) -> int:
    """The number that the next release gets; rows are never deleted, so none is given twice."""
    last = session.scalar(select(func.max(ReleaseRow.sequence))) or 0
    return 1 + max(last, get_meta(session, RELEASE_FLOOR_KEY) or 0)


def current_release(session: Session) -> Release | None:
    """What replicas and vehicles are told to run now."""
    row = _current_row(session)
    return None if row is None else _to_release(row)


def releases(session: Session) -> list[Release]:
    """All releases, oldest first."""
    return [_to_release(row) for row in session.scalars(select(ReleaseRow).order_by(ReleaseRow.sequence))]


def blob_digests(session: Session) -> set[str]:
    """Every blob that a version or a release names."""
    found = set(session.scalars(select(VersionRow.lineage[RULE_STATE].as_string())).all()) - {None}
    for row in session.execute(select(VersionRow.weights_digest, VersionRow.frozen_digest, VersionRow.artifacts)):
        found |= {row.weights_digest, row.frozen_digest, *row.artifacts.values()}
    return found.union(*(artifacts.values() for artifacts in session.scalars(select(ReleaseRow.artifacts))))


def leave_room(session: Session) -> None:
    """Make the next release's number higher than any that the original of a copied state gives meanwhile.

    Vehicles follow no number below one that they have seen.
    """
    set_meta(session, RELEASE_FLOOR_KEY, next_release_sequence(session) - 1 + RELEASE_MARGIN)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _current_row(session: Session) -> ReleaseRow | None:
    return session.scalar(select(ReleaseRow).order_by(ReleaseRow.sequence.desc()).limit(1))


def _version_row(session: Session, name: str) -> VersionRow:
    row = session.get(VersionRow, name)
    if row is None:
        raise NotFoundError(f"There is no model version {name!r}.", cure="Versions are named like v1.1.30.")
    return row


def _to_version(row: VersionRow) -> ModelVersion:
    return ModelVersion(
        version=row.version,
        run_id=row.run_id,
        round_index=row.round_index,
        weights_digest=row.weights_digest,
        frozen_digest=row.frozen_digest,
        created_at=row.created_at,
        epsilon=row.epsilon,
        metrics=row.metrics,
        lineage=row.lineage,
        artifacts=row.artifacts,
        derived_from=row.derived_from,
        refusal=row.refusal,
    )


def _to_release(row: ReleaseRow) -> Release:
    return Release(
        sequence=row.sequence,
        version=row.version,
        artifacts=row.artifacts,
        envelopes=row.envelopes,
        at=row.at,
        reason=row.reason,
        serve_variant=row.serve_variant,
    )
