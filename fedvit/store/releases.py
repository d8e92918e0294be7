"""The sequence of releases: which model version replicas and vehicles run, and as which variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError
from fedvit.store.ledger import Ledger
from fedvit.store.metadata import RELEASE_FLOOR_KEY, get_value, set_value
from fedvit.store.records import Release
from fedvit.store.repository import Repository, get_row, insert_row, record_of
from fedvit.store.tables import ReleaseRow, VersionRow

RELEASE_MARGIN = 10_000
"""More releases than anybody makes between a backup and the loss of its original."""
_NEWEST_FIRST = select(ReleaseRow).order_by(ReleaseRow.sequence.desc())


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
            current = session.scalar(_NEWEST_FIRST.limit(1))
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
            insert_row(session, ReleaseRow(**asdict(release)))
            return release

    def current(self) -> Release | None:
        """The release that replicas and vehicles run now, or None."""
        return self._first(Release, _NEWEST_FIRST)

    def of_version(self, version: str) -> Release | None:
        """The last release of a version, or None."""
        return self._first(Release, _NEWEST_FIRST.where(ReleaseRow.version == version))

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
