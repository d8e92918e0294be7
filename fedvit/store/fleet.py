"""Which fleet a state folder belongs to, its clients, and small facts about it. Functions of an open session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar
from typing import cast as typed

from sqlalchemy import ColumnElement, Integer, Select, Table, and_, bindparam, cast, func, insert, or_, select, update
from sqlalchemy.orm import Session

from fedvit.errors import NotFoundError, StateError
from fedvit.store.records import ClientPage, FleetInfo, Validation
from fedvit.store.tables import ClientRow, MetaRow, among
from fedvit.types import Client, ClientKind, LastContact

FLEET_KEY = "fleet"
# Behind it the client's id: a fleet of ten thousand must not rewrite one long value for each verdict.
_VALIDATION_KEY = "validation/"
# Rows of a registration that are in memory at once.
_BULK = 10_000
_Query = TypeVar("_Query", bound=Select[Any])


def get_meta(session: Session, key: str) -> Any | None:
    """The JSON value under ``key``, or None."""
    row = session.get(MetaRow, key)
    return None if row is None else row.value


def set_meta(session: Session, key: str, value: Any) -> None:
    """Store a JSON value under ``key``."""
    session.merge(MetaRow(key=key, value=value))


def fleet(session: Session) -> FleetInfo | None:
    """The fleet recorded by :func:`bind_fleet`, if any."""
    found = get_meta(session, FLEET_KEY)
    return None if found is None else _to_fleet(found)


def bind_fleet(session: Session, info: FleetInfo) -> None:
    """Record the fleet, or compare it with the one on record.

    Raises:
        StateError: the state belongs to another fleet.
    """
    bound = fleet(session)
    if bound is None:
        value = {"data_digest": info.data_digest, "partition": dict(info.partition), "classes": list(info.classes)}
        set_meta(session, FLEET_KEY, value)
    elif bound != info:
        differing = [
            name for name in ("data_digest", "partition", "classes") if getattr(bound, name) != getattr(info, name)
        ]
        raise StateError(
            f"This state folder belongs to data {bound.data_digest}, and what was started brings data "
            f"{info.data_digest}; they differ in {', '.join(differing)}.",
            cure="Name another folder with --home, or run `make reset`.",
            differing=differing,
        )


def register_clients(session: Session, clients: Iterable[Client]) -> int:
    """Insert new clients and refresh known ones; what an operator decides (validated, active) stays as decided.

    A million of them are never in memory at once.
    """
    before = position = population(session)
    remaining = iter(clients)
    while wanted := {client.client_id: client for client in islice(remaining, _BULK)}:
        known = _known_ids(session, list(wanted)) if position else set()
        new = [_to_columns(client) for client_id, client in wanted.items() if client_id not in known]
        refreshed = [_refreshable(wanted[client_id]) for client_id in known]
        if new:
            numbered = [columns | {"position": position + i} for i, columns in enumerate(new)]
            session.connection().execute(insert(typed(Table, ClientRow.__table__)), numbered)
            position += len(new)
        if refreshed:
            session.execute(update(ClientRow), refreshed)
    return position - before


def population(session: Session) -> int:
    """How many clients are registered; each has a position below that."""
    last = session.scalar(select(func.max(ClientRow.position)))
    return 0 if last is None else last + 1


def eligible_at(
    session: Session, positions: Sequence[int], validated_only: bool, heard_since: datetime | None
) -> dict[int, str]:
    """Those of the clients at these positions that may be drawn, by position."""
    query = select(ClientRow.position, ClientRow.client_id).where(among(ClientRow.position, positions))
    return dict(session.execute(query.where(*_eligibility(validated_only, heard_since))).tuples().all())


def count_eligible(session: Session, validated_only: bool, heard_since: datetime | None, at_most: int | None) -> int:
    """How many clients may be drawn; no more than ``at_most`` are counted."""
    found = select(ClientRow.position).where(*_eligibility(validated_only, heard_since)).limit(at_most).subquery()
    return session.scalar(select(func.count()).select_from(found)) or 0


def count_units(session: Session) -> tuple[int, int]:
    """How many active clients there are, and how many examples they have."""
    totals = select(func.count(), func.sum(ClientRow.num_examples)).where(ClientRow.active)
    clients, examples = session.execute(totals).one()
    return clients, examples or 0


def num_examples(session: Session, client_ids: Sequence[str]) -> dict[str, int]:
    """How many examples these clients are registered with; unknown ones are left out."""
    query = select(ClientRow.client_id, ClientRow.num_examples).where(among(ClientRow.client_id, client_ids))
    return dict(session.execute(query).tuples().all())


def _eligibility(validated_only: bool, heard_since: datetime | None) -> list[ColumnElement[bool]]:
    """Active, with data, not in quarantine, there, and validated where that is asked for."""
    there: ColumnElement[bool] = ClientRow.kind == ClientKind.VIRTUAL.value
    if heard_since is not None:
        trains = func.json_type(ClientRow.capabilities, "$.training") == "object"
        there = or_(there, and_(trains, ClientRow.last_seen_at >= heard_since))
    always = [ClientRow.active.is_(True), ClientRow.num_examples > 0, ClientRow.quarantined_at.is_(None), there]
    return [*always, ClientRow.validated.is_(True)] if validated_only else always


def client(session: Session, client_id: str) -> Client:
    """One client.

    Raises:
        NotFoundError: no such client.
    """
    return _to_client(_client_row(session, client_id))


def clients(
    session: Session, active: bool | None, validated: bool | None, offset: int, limit: int | None
) -> list[Client]:
    """Clients ordered by id."""
    query = _matching(select(ClientRow), active, validated).order_by(ClientRow.client_id).offset(offset).limit(limit)
    return [_to_client(row) for row in session.scalars(query)]


def remote_clients(session: Session, client_ids: Sequence[str]) -> list[Client]:
    """Those of these clients that are active and not virtual, ordered by id."""
    remote = select(ClientRow).where(ClientRow.active, ClientRow.kind != ClientKind.VIRTUAL.value)
    rows = session.scalars(remote.where(among(ClientRow.client_id, client_ids)).order_by(ClientRow.client_id))
    return [_to_client(row) for row in rows]


def count_clients(
    session: Session, active: bool | None, validated: bool | None, quarantined: bool | None = None
) -> int:
    """How many clients match."""
    query = _matching(select(func.count()).select_from(ClientRow), active, validated)
    if quarantined is not None:
        since = ClientRow.quarantined_at
        query = query.where(since.is_not(None) if quarantined else since.is_(None))
    return session.scalar(query) or 0


def metrics_addresses(session: Session) -> dict[str, str]:
    """What active clients that are not virtual say as their capability ``metrics``, where it is text."""
    said = func.json_extract(ClientRow.capabilities, "$.metrics")
    is_text = func.json_type(ClientRow.capabilities, "$.metrics") == "text"
    real = and_(ClientRow.active.is_(True), ClientRow.kind != ClientKind.VIRTUAL.value, is_text)
    query = select(ClientRow.client_id, said).where(real).order_by(ClientRow.client_id)
    return {client_id: str(address) for client_id, address in session.execute(query)}


def set_client(session: Session, client_id: str, active: bool | None, validated: bool | None) -> Client:
    """Change what is not None.

    Raises:
        NotFoundError: no such client.
    """
    row = _client_row(session, client_id)
    row.active = row.active if active is None else active
    row.validated = row.validated if validated is None else validated
    return _to_client(row)


def client_page(session: Session, offset: int, limit: int) -> ClientPage:
    """A page of clients and the totals."""
    flags = (func.count(), func.sum(cast(ClientRow.active, Integer)), func.sum(cast(ClientRow.validated, Integer)))
    total, active, validated = session.execute(select(*flags).select_from(ClientRow)).one()
    page = clients(session, None, None, offset, limit)
    return ClientPage(
        total, active or 0, validated or 0, tuple(page), validations(session, [found.client_id for found in page])
    )


def last_contacts(session: Session, hosted: bool) -> list[LastContact]:
    """The whereabouts of all active clients, ordered by id; of virtual ones only where ``hosted`` are asked for."""
    columns = select(ClientRow.client_id, ClientRow.kind, ClientRow.last_seen_at).where(ClientRow.active)
    columns = columns if hosted else columns.where(ClientRow.kind != ClientKind.VIRTUAL.value)
    rows = session.execute(columns.order_by(ClientRow.client_id))
    return [LastContact(client_id, ClientKind(kind), at) for client_id, kind, at in rows]


def count_hosted(session: Session) -> int:
    """How many active clients are virtual."""
    total = population(session)
    others = select(func.count()).select_from(ClientRow)
    return total - (session.scalar(others.where(~ClientRow.active | (ClientRow.kind != ClientKind.VIRTUAL.value))) or 0)


def validate_client(session: Session, client_id: str, verdict: Validation) -> Client:
    """Record whether a client is validated, and why; an automatic verdict changes nothing an operator decided.

    Raises:
        NotFoundError: no such client.
    """
    row = _client_row(session, client_id)
    value = {"validated": verdict.validated, "reason": verdict.reason, "at": verdict.at.isoformat()}
    if verdict.automatic:
        if (found := get_meta(session, _VALIDATION_KEY + client_id)) and not found.get("automatic"):
            # In this transaction: an operator may have decided while somebody judged.
            return _to_client(_client_row(session, client_id))
        value["automatic"] = True
    row.validated = verdict.validated
    set_meta(session, _VALIDATION_KEY + client_id, value)
    return _to_client(row)


def validations(session: Session, client_ids: Sequence[str]) -> dict[str, Validation]:
    """What operators last decided on these clients."""
    keys = [_VALIDATION_KEY + client_id for client_id in client_ids]
    rows = session.scalars(select(MetaRow).where(among(MetaRow.key, keys)))
    return {row.key.removeprefix(_VALIDATION_KEY): _to_validation(row.value) for row in rows}


def quarantine_clients(session: Session, client_ids: Sequence[str], reason: str, at: datetime) -> list[str]:
    """Keep these clients out of every round; return those that are registered. The first quarantine stands."""
    known = sorted(_known_ids(session, client_ids))
    for client_id in known:
        row = _client_row(session, client_id)
        if row.quarantined_at is None:
            row.quarantined_at, row.quarantine_reason = at, reason
    return known


def quarantined_clients(session: Session) -> list[str]:
    """Ids of all clients in quarantine, sorted."""
    query = select(ClientRow.client_id).where(ClientRow.quarantined_at.is_not(None)).order_by(ClientRow.client_id)
    return list(session.scalars(query))


def reinstate_client(session: Session, client_id: str) -> Client:
    """Lift a client's quarantine; harmless where there is none.

    Raises:
        NotFoundError: no such client.
    """
    row = _client_row(session, client_id)
    row.quarantined_at = row.quarantine_reason = None
    return _to_client(row)


def touch_clients(session: Session, seen: Mapping[str, datetime]) -> None:
    """Move ``last_seen_at`` of these clients forward, never back; unknown ones are passed over."""
    moment = bindparam("at", type_=ClientRow.last_seen_at.type)
    later = or_(ClientRow.last_seen_at.is_(None), ClientRow.last_seen_at < moment)
    touch = update(typed(Table, ClientRow.__table__)).where(ClientRow.client_id == bindparam("who"), later)
    if seen:
        rows = [{"who": client_id, "at": at} for client_id, at in seen.items()]
        session.connection().execute(touch.values(last_seen_at=moment), rows)


def _known_ids(session: Session, client_ids: Sequence[str]) -> set[str]:
    return set(session.scalars(select(ClientRow.client_id).where(among(ClientRow.client_id, client_ids))))


def _matching(query: _Query, active: bool | None, validated: bool | None) -> _Query:
    if active is not None:
        query = query.where(ClientRow.active.is_(active))
    if validated is not None:
        query = query.where(ClientRow.validated.is_(validated))
    return query


def _client_row(session: Session, client_id: str) -> ClientRow:
    row = session.get(ClientRow, client_id)
    if row is None:
        raise NotFoundError(f"There is no client {client_id!r}.", cure="Name a registered client.")
    return row


def _to_client(row: ClientRow) -> Client:
    return Client(
        client_id=row.client_id,
        kind=ClientKind(row.kind),
        num_examples=row.num_examples,
        validated=row.validated,
        active=row.active,
        registered_at=row.registered_at,
        capabilities=row.capabilities,
        last_seen_at=row.last_seen_at,
        quarantined_at=row.quarantined_at,
        quarantine_reason=row.quarantine_reason,
    )


def _to_validation(value: Mapping[str, Any]) -> Validation:
    at = datetime.fromisoformat(value["at"])
    return Validation(value["validated"], value["reason"], at, value.get("automatic", False))


def _refreshable(client: Client) -> dict[str, Any]:
    return {
        "client_id": client.client_id,
        "kind": client.kind.value,
        "num_examples": client.num_examples,
        "capabilities": dict(client.capabilities),
    }


def _to_columns(client: Client) -> dict[str, Any]:
    decided = {"validated": client.validated, "active": client.active, "registered_at": client.registered_at}
    return _refreshable(client) | decided


def _to_fleet(value: Mapping[str, Any]) -> FleetInfo:
    return FleetInfo(value["data_digest"], value["partition"], tuple(value["classes"]))
