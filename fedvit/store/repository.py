"""Base class of the repositories, and the queries that they share."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import datetime
from enum import Enum, EnumType
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, cast, get_origin, get_type_hints

from sqlalchemy import ColumnElement, Row, Select, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from fedvit.errors import NotFoundError
from fedvit.store.database import Sessions
from fedvit.store.tables import Base, ClientRow, IncidentRow, OperationRow, RunRow, TokenRow, VersionRow

_Record = TypeVar("_Record")
_Row = TypeVar("_Row", bound=Base)
_Value = TypeVar("_Value")

# Table -> what a row of it is called in messages, and the cure where there is none.
_MISSING: dict[type[Base], tuple[str, str]] = {
    ClientRow: ("client", "Name a registered client."),
    IncidentRow: ("incident", "See GET /api/incidents."),
    OperationRow: ("operation", "See GET /api/operations."),
    RunRow: ("run", "Runs are named like run-0001."),
    TokenRow: ("token", "See `fedvit token list`."),
    VersionRow: ("model version", "Versions are named like v1.1.30."),
}


class Repository:
    """Base of the classes that read and write one subject in the state database."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def _read(self) -> AbstractContextManager[Session]:
        return self._sessions.read()

    def _write(self) -> AbstractContextManager[Session]:
        return self._sessions.write()

    def _now(self) -> datetime:
        return self._sessions.clock.now()

    def _get(self, record_type: type[_Record], table: type[Base], key: str) -> _Record:
        """The record of the row with this key; raises as :func:`get_row` does."""
        with self._read() as session:
            return record_of(record_type, get_row(session, table, key))

    def _records(self, record_type: type[_Record], query: Select[Any]) -> list[_Record]:
        """The records of the mapped rows that a query finds."""
        with self._read() as session:
            return [record_of(record_type, row) for row in session.scalars(query)]

    def _first(self, record_type: type[_Record], query: Select[Any]) -> _Record | None:
        """The record of the first mapped row that a query finds, or None."""
        with self._read() as session:
            row = session.scalar(query.limit(1))
            return None if row is None else record_of(record_type, row)

    def _values(self, query: Select[_Value]) -> list[_Value]:
        """The values of a query of one column."""
        with self._read() as session:
            return list(session.scalars(query))

    def _count(self, query: Select[int]) -> int:
        """The number that a query of one count finds."""
        with self._read() as session:
            return session.scalar(query) or 0


def get_row(session: Session, table: type[_Row], key: str) -> _Row:
    """The row with this key, of a table whose missing rows have a message.

    Raises:
        NotFoundError: there is none.
    """
    row = session.get(table, key)
    if row is None:
        kind, cure = _MISSING[table]
        raise NotFoundError(f"There is no {kind} {key!r}.", cure=cure)
    return row


def insert_row(session: Session, row: _Row) -> _Row:
    """Insert a row at once, so that its defaults are set and what is read afterwards includes it."""
    session.add(row)
    session.flush()
    return row


def next_number(session: Session, column: InstrumentedAttribute[int], *conditions: ColumnElement[bool]) -> int:
    """One more than the largest number of a column where the conditions hold; 1 where there is none."""
    return 1 + (session.scalar(select(func.max(column)).where(*conditions)) or 0)


def record_of(record_type: type[_Record], row: Base | Row[Any], **converted: Any) -> _Record:
    """A frozen record (a dataclass) of the row's columns of the same names, except those given ``converted``.

    A column becomes a member of the enum, or a tuple, where the record declares one.
    """
    names, values_of, conversions = _columns(cast(Hashable, record_type), tuple(converted))
    values = dict(zip(names, values_of(row), strict=True))
    for name, convert in conversions:
        values[name] = convert(values[name])
    return record_type(**values, **converted)


def columns_of(record: object, **converted: Any) -> dict[str, Any]:
    """The columns of a record, except those given ``converted``: the inverse of :func:`record_of`."""
    names, values_of, _ = _columns(cast(Hashable, type(record)), tuple(converted))
    return {name: _plain(value) for name, value in zip(names, values_of(record), strict=True)} | converted


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


@cache
def _columns(
    record_type: Any, converted: tuple[str, ...]
) -> tuple[tuple[str, ...], Callable[[object], Any], tuple[tuple[str, Callable[[Any], Any]], ...]]:
    names = tuple(field.name for field in fields(record_type) if field.name not in converted)
    hints = get_type_hints(record_type)
    types = [(name, get_origin(hints[name]) or hints[name]) for name in names]
    conversions = tuple((name, kind) for name, kind in types if kind is tuple or isinstance(kind, EnumType))
    return names, attrgetter(*names), conversions


def among(column: InstrumentedAttribute[Any], values: Iterable[str] | Iterable[int]) -> ColumnElement[bool]:
    """Whether a column's value is one of these; they are one bound parameter, however many they are."""
    listed = func.json_each(json.dumps(list(values))).table_valued("value")
    return column.in_(select(listed.c.value))
