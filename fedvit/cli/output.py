"""Printing what the control API answered, whatever it is: JSON for a program, tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from fedvit.cli.common import console, print_json

if TYPE_CHECKING:
    from pydantic import BaseModel


def plain(found: Any) -> Any:
    """A view, or a sequence of them, as JSON types."""
    if isinstance(found, tuple):
        return [plain(each) for each in found]
    return found.model_dump(mode="json") if hasattr(found, "model_dump") else found


def show(found: BaseModel | Sequence[BaseModel] | Mapping[str, Any], as_json: bool, *columns: str) -> None:
    """Print it; ``columns`` are those of a table, all where there are none."""
    facts = plain(found)
    if as_json:
        print_json(facts)
    elif isinstance(facts, list):
        show_rows(facts, *columns)
    else:
        show_fields(facts)


def show_fields(facts: Mapping[str, Any], to: Console = console) -> None:
    """Names and values, one a line; what is a table in itself follows."""
    from rich.table import Table

    tables = {name: value for name, value in facts.items() if _is_rows(value)}
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name not in tables:
            table.add_row(f"[bold]{escape(_title(name))}[/]", _cell(value))
    to.print(table)
    for name, rows in tables.items():
        to.print(f"\n[bold]{escape(_title(name))}[/]")
        show_rows(rows, to=to)


def show_rows(rows: Sequence[Mapping[str, Any]], *columns: str, to: Console = console) -> None:
    """One line a row."""
    from rich.table import Table

    if not rows:
        to.print("[dim]There are none.[/]")
        return
    names = columns or tuple(rows[0])
    table = Table(box=None)
    for index, name in enumerate(names):
        # What a row is called is to be copied, and so stays on one line.
        table.add_column(_title(name), no_wrap=index == 0)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    to.print(table)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{escape(str(name))}={_cell(each)}" for name, each in value.items()) or "–"
        case list():
            return ", ".join(map(_cell, value)) or "–"
    return escape(str(value))
