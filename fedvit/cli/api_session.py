"""One command's conversation with a control API: which one, what it may change, and how long work is awaited."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from fedvit.cli.common import console, errors, explained, print_json, running_system, settings_from
from fedvit.cli.control import control_client
from fedvit.cli.output import show, show_fields
from fedvit.errors import FedvitError, InterruptedRunError, StateError, UsageError

if TYPE_CHECKING:
    import httpx

    from fedvit.api.operations import OperationView
    from fedvit.client import FedvitClient
    from fedvit.config import Settings

T = TypeVar("T")


class _RehearsedError(Exception):
    """Carries the request that a dry run holds back."""

    def __init__(self, request: httpx.Request) -> None:
        super().__init__(str(request.url))
        self.request = request


@dataclass(frozen=True, slots=True)
class ApiSession:
    """The client, and how the user wants to be served."""

    client: FedvitClient
    settings: Settings
    as_json: bool
    dry_run: bool
    yes: bool

    def change(
        self,
        call: Callable[[], T],
        *,
        present: Callable[[], Mapping[str, Any]],
        question: str | None = None,
    ) -> T:
        """Make a change, if the user means it.

        Args:
            call: makes it.
            present: what it would change; asked for a dry run and for a question, never in the way of ``--yes``.
            question: what a user is asked before; none for a change that does no harm.

        Raises:
            UsageError: it must be confirmed, and nobody is there to ask.
        """
        if self.dry_run:
            self._rehearse(call, present())
        if question is not None and not self.yes:
            _confirm(question, present)
        return call()

    def show(self, found: Any, *columns: str) -> None:
        """Print an answer."""
        show(found, self.as_json, *columns)

    def finish(self, operation: OperationView, *, no_wait: bool = False, timeout_s: float | None = None) -> None:
        """Follow an operation to its end, and print it; status 1 when it did not succeed."""
        ended = operation if no_wait else self._followed(operation, timeout_s)
        self.show(ended)
        if ended.status.ended and ended.status != "succeeded":
            errors.print(f"[bold red]Error:[/] The operation {ended.operation_id} is {ended.status}.", highlight=False)
            raise typer.Exit(1)

    def _followed(self, operation: OperationView, timeout_s: float | None) -> OperationView:
        name = operation.operation_id
        with _progress_line(quiet=self.as_json) as tell:
            try:
                return self.client.operations.wait(operation, timeout_s, tell)
            except KeyboardInterrupt:
                cure = f"`fedvit operation wait {name}` waits again, `fedvit operation cancel {name}` ends it."
                raise InterruptedRunError(f"The operation {name} goes on.", cure=cure) from None

    def _rehearse(self, call: Callable[[], object], facts: Mapping[str, Any]) -> NoReturn:
        try:
            call()
        except _RehearsedError as held:
            self._show_rehearsal(held.request, facts)
            raise typer.Exit from None
        raise AssertionError("a dry run holds every change back")

    def _show_rehearsal(self, request: httpx.Request, facts: Mapping[str, Any]) -> None:
        told: dict[str, Any] = {"method": request.method, "url": str(request.url)}
        told |= {"body": json.loads(request.content)} if request.content else {}
        told |= {"if_match": request.headers["If-Match"]} if "If-Match" in request.headers else {}
        if self.as_json:
            print_json({"dry_run": True, "request": told, "present": facts})
            return
        console.print("[bold]At present[/]")
        show_fields(facts)
        console.print("\n[bold]Would be sent[/] (nothing was)")
        typer.echo(f"{told.pop('method')} {told.pop('url')}")
        show_fields(told)


@contextlib.contextmanager
def asking(
    home: Path | None,
    url: str | None,
    config: Path | None,
    as_json: bool,
    *,
    dry_run: bool = False,
    yes: bool = False,
) -> Iterator[ApiSession]:
    """A conversation with the control API at ``url``, or with that of the system on ``home``; errors are explained."""
    with explained(as_json):
        settings = settings_from(config, home)
        base_url = url_given(home, url) or _url_of_running(settings)
        with control_client(base_url, settings, _hold_back if dry_run else None) as client:
            yield ApiSession(client, settings, as_json, dry_run, yes)


def url_given(home: Path | None, url: str | None) -> str | None:
    """The control API that the user named. What he typed goes before what the environment says."""
    named = url if url is not None or home is not None else os.environ.get("FEDVIT_URL", "")
    return (named or "").strip() or None


def _url_of_running(settings: Settings) -> str:
    running = running_system(settings.home)
    if running is None:
        raise StateError(
            f"Nothing runs on {settings.home}.", cure="Start it with `fedvit up`, or name a control API with --url."
        )
    return running.urls.control


def _hold_back(request: httpx.Request) -> NoReturn:
    raise _RehearsedError(request)


def _confirm(question: str, present: Callable[[], Mapping[str, Any]]) -> None:
    if not is_terminal():
        raise UsageError(
            "This must be confirmed, and standard input is no terminal.",
            cure="Repeat it with --yes, or look first with --dry-run.",
        )
    show_fields(present(), errors)
    if not typer.confirm(question, err=True):
        raise FedvitError("Nothing was sent.")


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


@contextlib.contextmanager
def _progress_line(quiet: bool) -> Iterator[Callable[[OperationView], None]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]{task.fields[kind]}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[stage]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, disable=quiet) as line:
        task = line.add_task("", total=1.0, kind="", stage="")

        def tell(operation: OperationView) -> None:
            line.update(task, completed=operation.progress, kind=operation.kind, stage=operation.stage)

        yield tell
