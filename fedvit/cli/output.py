"""Output of the commands: JSON for a program, tables and text for people."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


def print_facts(facts: Any, as_json: bool) -> None:
    """Print one JSON document, coloured for people unless ``as_json``."""
    if as_json:
        print_json(facts)
    else:
        console.print_json(data=facts, default=str)


def print_step(step: str, *, quiet: bool = False) -> None:
    """Print one step of a longer command."""
    if not quiet:
        console.print(f"[dim]•[/] {step}")


def stdout_for_json(as_json: bool) -> AbstractContextManager[object]:
    """Send what libraries print (Ray does) to standard error, where standard output is for one JSON document."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def plain(value: Any) -> Any:
    """A response model, or a sequence of them, as JSON types."""
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def show(value: Any, as_json: bool, *columns: str) -> None:
    """Print response models, mappings or rows; ``columns`` are those of a table, all columns by default."""
    facts = plain(value)
    if as_json:
        print_json(facts)
    elif isinstance(facts, list):
        show_rows(facts, *columns)
    else:
        show_fields(facts)


def show_text(text: str, value: Any, as_json: bool) -> None:
    """Print ``value`` as JSON, or else ``text`` as it is."""
    if as_json:
        print_json(value)
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_fields(facts: Mapping[str, Any], to: Console = console) -> None:
    """Print names and values, one a line; values that are tables follow below."""
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
    """Print a table with one line a row."""
    if not rows:
        to.print("[dim]There are none.[/]")
        return
    names = columns or tuple(rows[0])
    show_table(map(_title, names), ([_cell(row.get(name)) for name in names] for row in rows), to=to)


def show_table(titles: Iterable[str], rows: Iterable[Iterable[str]], to: Console = console) -> None:
    """Print a table of cells, which may contain Rich markup."""
    from rich.table import Table

    table = Table(box=None)
    for index, title in enumerate(titles):
        # The first column is an identifier to copy, so it stays on one line.
        table.add_column(title, no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    to.print(table)


@contextlib.contextmanager
def progress_bar(to: Console, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """A progress bar, drawn on ``to`` unless ``quiet``; yields a function that updates it.

    The function takes ``total`` and ``completed`` (numbers), ``description`` (before the bar) and ``text`` (after it).
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.fields[text]}", markup=False)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TaskProgressColumn(), text, TimeElapsedColumn())
    with Progress(*columns, console=to, disable=quiet) as progress:
        yield functools.partial(progress.update, progress.add_task("", total=None, text=""))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M}"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{escape(str(name))}={_cell(each)}" for name, each in value.items()) or "–"
        case list():
            return ", ".join(map(_cell, value)) or "–"
    return escape(str(value))
