"""Output of the commands: JSON for a program, tables and text for people."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

LEAST_COLUMN = 30
"""The width to which the widest column of a table may be narrowed; below it, rows become blocks of lines."""
# Of a line of progress: numbers, a short bar and the times.
_REST_OF_PROGRESS = 39
# A point in time, as JSON has it.
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*(Z|\+00:00)")
console = Console()
errors = Console(stderr=True)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


def print_step(step: str, *, quiet: bool = False) -> None:
    """Print one step of a longer command."""
    if not quiet:
        console.print(f"[dim]•[/] {escape(step)}", soft_wrap=True)


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


def show_traceback(text: str) -> None:
    """Print the traceback of a user's own code on standard error."""
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


def show_text(text: str, value: Any, as_json: bool) -> None:
    """Print ``value`` as JSON, or else ``text`` as it is."""
    if as_json:
        print_json(value)
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_fields(facts: Mapping[str, Any], to: Console = console) -> None:
    """Print names and values, one a line; values that are tables follow below. A word is never broken: it is copied."""
    tables = {name: value for name, value in facts.items() if _is_rows(value)}
    rest = {name: value for name, value in facts.items() if name not in tables}
    for line in _field_lines(rest, to.width):
        to.print(line, soft_wrap=True, highlight=False)
    for name, rows in tables.items():
        to.print(f"\n[bold]{escape(_title(name))}[/]")
        show_rows(rows, to=to)


def _field_lines(facts: Mapping[str, Any], width: int, indent: int = 1) -> Iterator[Text]:
    column = max((len(name) for name in facts), default=0) + 2
    for name, value in facts.items():
        title = Text.assemble(" " * indent, (_title(name), "bold"), " " * (column - len(name)))
        deep = isinstance(value, dict) and any(isinstance(each, dict) or _is_rows(each) for each in value.values())
        nested = [value] if deep else value if _is_rows(value) else []
        if nested:
            yield title
            for each in nested:
                yield from _field_lines(each, width, indent + 2)
            continue
        text, free = Text.from_markup(_cell(value)), max(width - indent - column, 20)
        if text.cell_len <= free:
            yield title + text
            continue
        first, *rest = textwrap.wrap(text.plain, free, break_long_words=False, break_on_hyphens=False) or [""]
        yield title + Text(first)
        yield from (Text(" " * (indent + column) + line) for line in rest)


def show_lines(title: str, lines: Iterable[str], to: Console = console) -> None:
    """Print lines of a file as they are, under a title."""
    to.print(f"\n[bold]{escape(title)}[/]")
    for line in lines:
        to.print(f" {line}", markup=False, highlight=False, soft_wrap=True)


def show_rows(rows: Sequence[Mapping[str, Any]], *columns: str, to: Console = console) -> None:
    """Print a table with one line a row."""
    if not rows:
        to.print("[dim]There are none.[/]")
        return
    names = columns or tuple(rows[0])
    show_table(map(_title, names), ([_cell(row.get(name)) for name in names] for row in rows), to=to)


def show_table(titles: Iterable[str], rows: Iterable[Iterable[str]], to: Console = console) -> None:
    """Print a table of cells, which may contain Rich markup; where it is too wide, each row as a block of lines."""
    from rich.table import Table

    names, cells = list(titles), [list(row) for row in rows]
    columns = zip(names, *cells, strict=True)
    widths = [max(Text.from_markup(text).cell_len for text in column) for column in columns]
    free = to.width - sum(widths) - 2 * len(widths)
    widest = widths.index(max(widths))
    if free + widths[widest] < min(widths[widest], LEAST_COLUMN):
        for row in cells:
            for line in _field_lines(dict(zip(names, map(_Markup, row), strict=True)), to.width):
                to.print(line, soft_wrap=True, highlight=False)
            to.print()
        return
    table = Table(box=None)
    for index, name in enumerate(names):
        # Whatever may be copied stays on one line.
        table.add_column(name, no_wrap=index != widest or free >= 0)
    for row in cells:
        table.add_row(*row)
    to.print(table)


class _Markup(str):
    """A cell that is escaped already."""


@contextlib.contextmanager
def progress_bar(to: Console, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """A progress bar with the elapsed and the remaining time, drawn on ``to`` unless ``quiet``.

    Yields a function that updates it.

    The function takes ``total`` and ``completed`` (numbers), ``description`` (before the bar) and ``text`` (after it).
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    # A long text is cut, and not the times after it.
    widest = max(to.width - _REST_OF_PROGRESS, 10)
    text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, max_width=widest))
    times = TimeElapsedColumn(), TextColumn("[dim]left"), TimeRemainingColumn(compact=True)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=10), text, *times)
    with Progress(*columns, console=to, disable=quiet) as progress:
        yield functools.partial(progress.update, progress.add_task("", total=None, text=""))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    match value:
        case _Markup():
            return str(value)
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
    text = str(value)
    if _INSTANT.fullmatch(text):
        return text[:16].replace("T", " ")
    return escape(text)
