"""Small JSON facts about a state folder as a whole, by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, StateError
from fedvit.store.database import Sessions
from fedvit.store.records import FleetInfo
from fedvit.store.repository import Repository, columns_of
from fedvit.store.tables import MetaRow

FLEET_KEY = "fleet"
FREEZE_KEY = "ledger_freeze"
COPY_KEY = "ledger_copy"
"""Set in the database of every backup: what its original has charged since is not known."""
RELEASE_FLOOR_KEY = "release_floor"
"""Release numbers up to this one may have been given to releases that a restored state does not contain."""
BUDGET_REQUESTS_KEY = "budget_requests"
BUDGET_CALL_KEY = "budget_last_call"
_RESERVED = frozenset(
    {FLEET_KEY, FREEZE_KEY, COPY_KEY, RELEASE_FLOOR_KEY, BUDGET_REQUESTS_KEY, BUDGET_CALL_KEY}
    | {"ledger_head", "budget_head", "audit_head"}
)


def get_value(session: Session, key: str) -> Any | None:
    """The JSON value under ``key``, or None."""
    row = session.get(MetaRow, key)
    return None if row is None else row.value


def set_value(session: Session, key: str, value: Any) -> None:
    """Store a JSON value under any ``key``."""
    session.merge(MetaRow(key=key, value=value))


class Metadata(Repository):
    """Small JSON facts about the state folder as a whole."""

    def __init__(self, sessions: Sessions) -> None:
        super().__init__(sessions)
        self._cache: tuple[int | None, dict[str, Any]] = (None, {})

    def get(self, key: str) -> Any | None:
        """The JSON value under ``key``, or None. Polled: it is read again only after something was committed."""
        counter = self._sessions.change_counter()
        cached_at, values = self._cache
        if counter is None or cached_at != counter:
            values = {}
            self._cache = counter, values
        if key not in values:
            with self._read() as session:
                values[key] = get_value(session, key)
        return deepcopy(values[key])

    def set(self, key: str, value: Any) -> None:
        """Store a JSON value under ``key``.

        Raises:
            ConflictError: the store reserves that key.
        """
        if key in _RESERVED:
            raise ConflictError(f"The store keeps the key {key!r} for itself.", cure="Use another key.")
        with self._write() as session:
            set_value(session, key, value)

    def fleet(self) -> FleetInfo | None:
        """The fleet that the state folder is bound to, or None."""
        with self._read() as session:
            value = get_value(session, FLEET_KEY)
        return None if value is None else FleetInfo(value["data_digest"], value["partition"], tuple(value["classes"]))

    def bind_fleet(self, *, data_digest: str, partition: Mapping[str, Any], classes: Sequence[str]) -> None:
        """Record which data this state folder belongs to; harmless when it is the same again.

        Raises:
            StateError: it belongs to other data; the message names both digests.
        """
        info = FleetInfo(data_digest, dict(partition), tuple(classes))
        with self._sessions.transaction() as transaction, transaction.write() as session:
            bound = Metadata(transaction).fleet()
            if bound is None:
                set_value(session, FLEET_KEY, columns_of(info))
            elif bound != info:
                new = columns_of(info)
                differing = [name for name, value in columns_of(bound).items() if value != new[name]]
                raise StateError(
                    f"This state folder belongs to data {bound.data_digest}, and what was started brings data "
                    f"{info.data_digest}; they differ in {', '.join(differing)}.",
                    cure="Name another folder with --home, or run `make reset`.",
                    differing=differing,
                )
