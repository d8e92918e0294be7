"""The registered clients: who takes part, who was heard from, who is validated and who is in quarantine."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any
from typing import cast as typed

from sqlalchemy import ColumnElement, Integer, Table, and_, bindparam, cast, func, insert, or_, select, update
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, DataError, RateLimitedError
from fedvit.store.metadata import get_value, set_value
from fedvit.store.records import ClientPage, ClientValidation, RegistrationQuota
from fedvit.store.repository import Repository, among, get_row, insert_row, record_of
from fedvit.store.tables import ClientRow, MetaRow
from fedvit.types import CLIENT_ID, MAX_EXAMPLES, Client, ClientKind, LastContact

# Followed by the client's id: a fleet of ten thousand must not rewrite one long value for each decision.
_VALIDATION_KEY = "validation/"
_REGISTRATIONS_KEY = "registrations/"
# Rows of a registration that are in memory at once.
BULK = 10_000
_SECONDS_A_DAY = 86_400
_LEFT = {"left_population": True}
"""In the place of the capabilities of a virtual client that left the population."""
_IN_QUARANTINE = ClientRow.quarantined_at.is_not(None)
_IS_VIRTUAL = ClientRow.kind == ClientKind.VIRTUAL.value
# NULL, which admits nothing, where the client waits for its admission.
_IS_ADMITTED = ClientRow.num_examples <= ClientRow.admitted_examples


class Clients(Repository):
    """The registered clients. Each has a position from 0, without gaps, which it keeps."""

    def register(self, clients: Iterable[Client], *, complete: bool = False) -> int:
        """Insert new clients, refresh kind, records and capabilities of known ones; return how many are new.

        All of them are admitted with their numbers of examples. ``validated``, ``active`` and ``registered_at`` of a
        known client stay: an operator sets them. Clients are read in portions, so that a million of them are never
        in memory at once.

        Args:
            complete: these are all virtual clients: the others leave the population. They become inactive, until they
                are registered again.

        Raises:
            DataError: a client has no good id or number of examples.
        """
        with self._write() as session:
            before = position = _population(session)
            remaining, listed = iter(clients), bytearray(before)
            while portion := {client.client_id: client for client in islice(remaining, BULK)}:
                known = _positions(session, list(portion)) if position else {}
                for index in known.values():
                    if index < before:
                        listed[index] = 1
                new = [_to_columns(client) | _admitted(client) for c, client in portion.items() if c not in known]
                if new:
                    numbered = [columns | {"position": position + i} for i, columns in enumerate(new)]
                    session.connection().execute(insert(typed(Table, ClientRow.__table__)), numbered)
                    position += len(new)
                if known:
                    refreshed = (portion[client_id] for client_id in known)
                    _return(session, list(known))
                    session.execute(
                        update(ClientRow), [_refreshable(client) | _admitted(client) for client in refreshed]
                    )
            if complete:
                _leave(session, [index for index, there in enumerate(listed) if not there])
            return position - before

    def enrol(self, client: Client, *, admitted: bool, quota: RegistrationQuota | None = None) -> tuple[Client, bool]:
        """Register one client that is not virtual, and make it active; the client, and whether anything has changed.

        Args:
            admitted: admit it with its number of examples. Otherwise a new client waits for its admission, and an
                earlier admission of a known one stays as it is.
            quota: of what devices may change by themselves; None for an operator.

        Raises:
            ConflictError: it is a virtual client, or the fleet is full.
            DataError: see :meth:`register`.
            RateLimitedError: the client's registration was changed too often today.
        """
        columns = _refreshable(client) | (_admitted(client) if admitted else {})
        with self._read() as session:
            row = session.get(ClientRow, client.client_id)
            if row is not None and row.active and _has(row, columns):
                return record_of(Client, row), False
        with self._write() as session:
            row = session.get(ClientRow, client.client_id)
            if row is None:
                _check_room(session, quota)
                row = insert_row(session, ClientRow(**_to_columns(client) | columns, position=_population(session)))
                return record_of(Client, row), True
            if row.kind == ClientKind.VIRTUAL.value:
                raise ConflictError(
                    f"{client.client_id!r} is a virtual client of this system.", cure="Choose another device_id."
                )
            if quota is not None:
                _count_change(session, client.client_id, quota, self._now())
            for name, value in {**columns, "active": True}.items():
                setattr(row, name, value)
            return record_of(Client, row), True

    def get(self, client_id: str) -> Client:
        """One client; raises NotFoundError where there is none."""
        return self._get(Client, ClientRow, client_id)

    def all(self, *, active: bool | None = None) -> list[Client]:
        """Clients ordered by id; None filters nothing."""
        return self._records(Client, select(ClientRow).where(*_activity(active)).order_by(ClientRow.client_id))

    def page(self, offset: int, limit: int) -> ClientPage:
        """Clients ordered by id, and the totals, as of one moment."""
        flags = (func.count(), func.sum(cast(ClientRow.active, Integer)), func.sum(cast(ClientRow.validated, Integer)))
        with self._read() as session:
            total, active, validated = session.execute(select(*flags).select_from(ClientRow)).one()
            rows = session.scalars(select(ClientRow).order_by(ClientRow.client_id).offset(offset).limit(limit))
            clients = tuple(record_of(Client, row) for row in rows)
            validations = _validations(session, [client.client_id for client in clients])
            return ClientPage(total, active or 0, validated or 0, clients, validations)

    def remote(self, client_ids: Sequence[str]) -> list[Client]:
        """Those of these clients that are active and not virtual, ordered by id."""
        query = select(ClientRow).where(ClientRow.active, ~_IS_VIRTUAL, among(ClientRow.client_id, client_ids))
        return self._records(Client, query.order_by(ClientRow.client_id))

    def population(self) -> int:
        """How many clients are registered; each has a position below that."""
        with self._read() as session:
            return _population(session)

    def count(self, *, active: bool | None = None, quarantined: bool | None = None) -> int:
        """How many clients match; None filters nothing."""
        query = select(func.count()).select_from(ClientRow).where(*_activity(active))
        if quarantined is not None:
            query = query.where(_IN_QUARANTINE if quarantined else ~_IN_QUARANTINE)
        return self._count(query)

    def count_virtual(self) -> int:
        """How many active clients are virtual."""
        # The others are counted: they are few, and found without reading a large fleet.
        others = select(func.count()).select_from(ClientRow).where(~ClientRow.active | ~_IS_VIRTUAL)
        with self._read() as session:
            return _population(session) - (session.scalar(others) or 0)

    def count_units(self) -> tuple[int, int]:
        """How many active, admitted clients there are, and how many examples they have together."""
        totals = select(func.count(), func.sum(ClientRow.num_examples)).where(ClientRow.active, _IS_ADMITTED)
        with self._read() as session:
            clients, examples = session.execute(totals).one()
            return clients, examples or 0

    def num_examples(self, client_ids: Sequence[str]) -> dict[str, int]:
        """How many examples these clients are registered with; unknown ones are left out."""
        query = select(ClientRow.client_id, ClientRow.num_examples).where(among(ClientRow.client_id, client_ids))
        with self._read() as session:
            return dict(session.execute(query).tuples().all())

    def eligible_at(
        self,
        positions: Sequence[int],
        *,
        validated_only: bool = False,
        heard_since: datetime | None = None,
        identified: bool = False,
    ) -> dict[int, str]:
        """Those of the clients at these positions that may be selected, by position.

        They are active and admitted, have data, are not in quarantine, and are validated where ``validated_only`` asks
        for it. A
        client that is not virtual has a trainer and was heard since ``heard_since``: one that cannot answer is neither
        selected nor charged. Where ``identified`` asks for it, it has registered an identity key, too.
        """
        query = select(ClientRow.position, ClientRow.client_id).where(among(ClientRow.position, positions))
        with self._read() as session:
            eligibility = _eligibility(validated_only, heard_since, identified)
            return dict(session.execute(query.where(*eligibility)).tuples().all())

    def count_eligible(
        self,
        *,
        validated_only: bool = False,
        heard_since: datetime | None = None,
        identified: bool = False,
        at_most: int | None = None,
    ) -> int:
        """How many clients may be selected; no more than ``at_most`` are counted."""
        eligible = select(ClientRow.position).where(*_eligibility(validated_only, heard_since, identified))
        eligible = eligible.limit(at_most)
        return self._count(select(func.count()).select_from(eligible.subquery()))

    def metrics_addresses(self) -> dict[str, str]:
        """The metrics addresses that active remote clients have registered, by client. They are not verified."""
        address = func.json_extract(ClientRow.capabilities, "$.metrics")
        is_text = func.json_type(ClientRow.capabilities, "$.metrics") == "text"
        query = select(ClientRow.client_id, address).where(ClientRow.active.is_(True), ~_IS_VIRTUAL, is_text)
        with self._read() as session:
            rows = session.execute(query.order_by(ClientRow.client_id))
            return {client_id: str(address) for client_id, address in rows}

    def update(self, client_id: str, *, active: bool | None = None, validated: bool | None = None) -> Client:
        """Change what is not None. Raises NotFoundError where there is no such client."""
        with self._write() as session:
            row = get_row(session, ClientRow, client_id)
            row.active = row.active if active is None else active
            row.validated = row.validated if validated is None else validated
            return record_of(Client, row)

    def last_contacts(self, *, include_virtual: bool = True) -> list[LastContact]:
        """When each active client was last heard, ordered by id; virtual ones only with ``include_virtual``."""
        query = select(ClientRow.client_id, ClientRow.kind, ClientRow.last_seen_at).where(ClientRow.active)
        query = query if include_virtual else query.where(~_IS_VIRTUAL)
        with self._read() as session:
            rows = session.execute(query.order_by(ClientRow.client_id))
            return [LastContact(client_id, ClientKind(kind), at) for client_id, kind, at in rows]

    def set_last_seen(self, last_seen: Mapping[str, datetime]) -> None:
        """Move ``last_seen_at`` of these clients forward, never back; unknown ones are ignored."""
        at = bindparam("at", type_=ClientRow.last_seen_at.type)
        later = or_(ClientRow.last_seen_at.is_(None), ClientRow.last_seen_at < at)
        statement = update(typed(Table, ClientRow.__table__)).where(ClientRow.client_id == bindparam("id"), later)
        with self._write() as session:
            if last_seen:
                rows = [{"id": client_id, "at": moment} for client_id, moment in last_seen.items()]
                session.connection().execute(statement.values(last_seen_at=at), rows)

    def validate(self, client_id: str, decision: ClientValidation) -> Client:
        """Record whether a client's data is trusted, and why. An automatic decision never replaces an operator's.

        An operator who trusts it also admits the client, with the decision's number of examples or with its own.

        Raises:
            NotFoundError: no such client.
        """
        key = _VALIDATION_KEY + client_id
        value = {"validated": decision.validated, "reason": decision.reason, "at": decision.at.isoformat()}
        with self._write() as session:
            row = get_row(session, ClientRow, client_id)
            if decision.automatic:
                # Read in this transaction: an operator may have decided while the data was judged.
                if (present := get_value(session, key)) and not present.get("automatic"):
                    return record_of(Client, row)
                value["automatic"] = True
            elif decision.validated:
                row.admitted_examples = decision.admitted_examples or row.num_examples
            row.validated = decision.validated
            set_value(session, key, value)
            return record_of(Client, row)

    def validations(self, client_ids: Sequence[str]) -> dict[str, ClientValidation]:
        """The last decision on each of these clients; a client that nobody decided on is left out."""
        with self._read() as session:
            return _validations(session, client_ids)

    def quarantine(self, client_ids: Sequence[str], reason: str, at: datetime) -> list[str]:
        """Keep these clients out of every round; return those that are registered. The first quarantine stands."""
        with self._write() as session:
            known = sorted(_known_ids(session, client_ids))
            for client_id in known:
                row = get_row(session, ClientRow, client_id)
                if row.quarantined_at is None:
                    row.quarantined_at, row.quarantine_reason = at, reason
            return known

    def quarantined(self) -> list[str]:
        """Ids of all clients in quarantine, sorted."""
        return self._values(select(ClientRow.client_id).where(_IN_QUARANTINE).order_by(ClientRow.client_id))

    def quarantined_between(self, since: datetime, until: datetime) -> list[str]:
        """The clients that came into quarantine then and are still in it, sorted."""
        query = select(ClientRow.client_id).where(ClientRow.quarantined_at.between(since, until))
        return self._values(query.order_by(ClientRow.client_id))

    def reinstate(self, client_id: str) -> Client:
        """Lift a client's quarantine; harmless where there is none.

        Raises:
            NotFoundError: no such client.
        """
        with self._write() as session:
            row = get_row(session, ClientRow, client_id)
            row.quarantined_at = row.quarantine_reason = None
            return record_of(Client, row)


def _positions(session: Session, client_ids: Sequence[str]) -> dict[str, int]:
    query = select(ClientRow.client_id, ClientRow.position).where(among(ClientRow.client_id, client_ids))
    return dict(session.execute(query).tuples().all())


def _leave(session: Session, positions: Sequence[int]) -> None:
    """Make the active virtual clients at these positions inactive, and mark them as having left the population."""
    for start in range(0, len(positions), BULK):
        there = (among(ClientRow.position, positions[start : start + BULK]), _IS_VIRTUAL, ClientRow.active)
        session.execute(update(ClientRow).where(*there).values(active=False, capabilities=_LEFT))


def _return(session: Session, client_ids: Sequence[str]) -> None:
    """Make those of these clients active again that had left the population."""
    left = func.json_extract(ClientRow.capabilities, "$.left_population").is_(True)
    session.execute(update(ClientRow).where(among(ClientRow.client_id, client_ids), left).values(active=True))


def _population(session: Session) -> int:
    last = session.scalar(select(func.max(ClientRow.position)))
    return 0 if last is None else last + 1


def _check_room(session: Session, quota: RegistrationQuota | None) -> None:
    count = select(func.count()).select_from(ClientRow).where(~_IS_VIRTUAL)
    if quota is not None and (session.scalar(count) or 0) >= quota.max_clients:
        raise ConflictError(
            f"{quota.max_clients} vehicles are registered, as many as fleet.max_clients allows.",
            cure="Let an operator register the vehicle, or raise fleet.max_clients.",
        )


def _count_change(session: Session, client_id: str, quota: RegistrationQuota, at: datetime) -> None:
    """Count a change of a client's registration on this day (UTC)."""
    key, day = _REGISTRATIONS_KEY + client_id, at.astimezone(UTC).date().isoformat()
    counted = get_value(session, key) or {}
    changes = counted["changes"] if counted.get("day") == day else 0
    if changes >= quota.changes_per_day:
        raise RateLimitedError(
            f"The registration of {client_id!r} was changed {changes} times today.",
            cure="Wait until tomorrow, or let an operator register it.",
            retry_after_s=_SECONDS_A_DAY,
        )
    set_value(session, key, {"day": day, "changes": changes + 1})


def _has(row: ClientRow, columns: Mapping[str, Any]) -> bool:
    return all(getattr(row, name) == value for name, value in columns.items())


def _eligibility(
    validated_only: bool, heard_since: datetime | None, identified: bool = False
) -> list[ColumnElement[bool]]:
    reachable: ColumnElement[bool] = _IS_VIRTUAL
    if heard_since is not None:
        trains = func.json_type(ClientRow.capabilities, "$.training") == "object"
        has_key = func.json_type(ClientRow.capabilities, "$.training.identity") == "text"
        there = and_(trains, ClientRow.last_seen_at >= heard_since)
        reachable = or_(reachable, and_(there, has_key) if identified else there)
    always = [ClientRow.active.is_(True), ClientRow.num_examples > 0, _IS_ADMITTED, ~_IN_QUARANTINE, reachable]
    return [*always, ClientRow.validated.is_(True)] if validated_only else always


def _validations(session: Session, client_ids: Sequence[str]) -> dict[str, ClientValidation]:
    keys = [_VALIDATION_KEY + client_id for client_id in client_ids]
    rows = session.scalars(select(MetaRow).where(among(MetaRow.key, keys)))
    return {row.key.removeprefix(_VALIDATION_KEY): _to_validation(row.value) for row in rows}


def _known_ids(session: Session, client_ids: Sequence[str]) -> set[str]:
    return set(session.scalars(select(ClientRow.client_id).where(among(ClientRow.client_id, client_ids))))


def _activity(active: bool | None) -> list[ColumnElement[bool]]:
    return [] if active is None else [ClientRow.active.is_(active)]


def _to_validation(value: Mapping[str, Any]) -> ClientValidation:
    at = datetime.fromisoformat(value["at"])
    return ClientValidation(value["validated"], value["reason"], at, value.get("automatic", False))


def _refreshable(client: Client) -> dict[str, Any]:
    if re.fullmatch(CLIENT_ID, client.client_id) is None:
        raise DataError(f"{client.client_id!r:.80} is no id of a client.", cure=f"An id matches {CLIENT_ID}.")
    return {
        "client_id": client.client_id,
        "kind": client.kind.value,
        "num_examples": _count_of(client),
        "capabilities": dict(client.capabilities),
    }


def _count_of(client: Client) -> int:
    try:
        # A NumPy integer, which SQLite would store as bytes, becomes a Python one.
        count = -1 if isinstance(client.num_examples, bool) else operator.index(client.num_examples)
    except TypeError:
        count = -1
    if not 0 <= count <= MAX_EXAMPLES:
        raise DataError(
            f"{client.client_id} has {client.num_examples!r} examples.",
            cure=f"The number of examples is an integer from 0 to {MAX_EXAMPLES}.",
        )
    return count


def _admitted(client: Client) -> dict[str, int]:
    return {"admitted_examples": _count_of(client)}


def _to_columns(client: Client) -> dict[str, Any]:
    decided = {"validated": client.validated, "active": client.active, "registered_at": client.registered_at}
    return _refreshable(client) | decided
