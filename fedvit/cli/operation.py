"""``fedvit operation``: long operations of a running system."""

from __future__ import annotations

from typing import Annotated

import typer

from fedvit.cli.api_session import asking
from fedvit.cli.common import (
    ConfigOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    LimitOption,
    OffsetOption,
    UrlOption,
)
from fedvit.cli.output import plain
from fedvit.types import OperationStatus

app = typer.Typer(help="Long operations: watch, await or end them.", no_args_is_help=True)

OperationArgument = Annotated[str, typer.Argument(help="The operation's id, as `fedvit operation list` shows it.")]


@app.command("list")
def list_operations(
    statuses: Annotated[
        list[OperationStatus] | None, typer.Option("--status", help="Only those that stand so (repeatable).")
    ] = None,
    limit: LimitOption = 50,
    offset: OffsetOption = 0,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Operations, newest first."""
    with asking(home, url, config, as_json) as ask:
        found = ask.client.operations.list(*(statuses or ()), limit=limit, offset=offset)
        ask.show(found, "operation_id", "kind", "status", "progress", "stage", "created_at", "ended_at")


@app.command("show")
def show_operation(
    operation_id: OperationArgument,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """One operation: where it stands, what came of it."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.operations.get(operation_id))


@app.command("cancel")
def cancel(
    operation_id: OperationArgument,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End it early: at once while it is queued, at its next step while it runs; harmless after its end."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        operations = ask.client.operations
        cancelled = ask.change(
            lambda: operations.cancel(operation_id), present=lambda: plain(operations.get(operation_id))
        )
        ask.show(cancelled)


@app.command("wait")
def wait(
    operation_id: OperationArgument,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds to wait at most; the operation goes on.")
    ] = None,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Wait until it has ended; status 1 unless it succeeded."""
    with asking(home, url, config, as_json) as ask:
        ask.finish(ask.client.operations.get(operation_id), timeout_s=timeout_s)
