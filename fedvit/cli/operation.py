"""``fedvit operation``: long operations of a running system."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from fedvit.cli.api_session import ApiSession, api_command
from fedvit.cli.options import LimitOption, OffsetOption
from fedvit.types import OperationStatus

app = typer.Typer(help="List, follow and cancel long operations.", no_args_is_help=True)

OperationArgument = Annotated[str, Argument(help="The operation's id, as `fedvit operation list` shows it.")]


@api_command(app, "list", columns=("operation_id", "kind", "status", "progress", "stage", "created_at", "ended_at"))
def list_operations(
    session: ApiSession,
    statuses: Annotated[
        list[OperationStatus] | None, Option("--status", help="Only those with this status (repeatable).")
    ] = None,
    limit: LimitOption = 50,
    offset: OffsetOption = 0,
) -> object:
    """Operations, newest first."""
    return session.client.operations.list(*(statuses or ()), limit=limit, offset=offset)


@api_command(app, "show")
def show_operation(session: ApiSession, operation_id: OperationArgument) -> object:
    """One operation: its progress and its result."""
    return session.client.operations.get(operation_id)


@api_command(app, "cancel", change=True)
def cancel(session: ApiSession, operation_id: OperationArgument) -> object:
    """End it early: at once while it is queued, at its next step while it runs; harmless after its end."""
    operations = session.client.operations
    return session.change(lambda: operations.cancel(operation_id), present=lambda: operations.get(operation_id))


@api_command(app, "wait")
def wait(
    session: ApiSession,
    operation_id: OperationArgument,
    timeout_s: Annotated[
        float | None, Option("--timeout", min=0, help="Longest wait, in seconds; the operation goes on.")
    ] = None,
) -> None:
    """Wait until it has ended; status 1 unless it succeeded."""
    session.finish(session.client.operations.get(operation_id), timeout_s=timeout_s)
