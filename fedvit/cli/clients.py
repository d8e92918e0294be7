"""``fedvit clients | backup-channel``: the clients, and the mailbox for vehicles that cannot reach the control API."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer import Argument, Option

from fedvit.api.choices import HeartbeatStatus, RemoteKind
from fedvit.cli.api_session import ApiSession, api_command
from fedvit.cli.options import LimitOption, OffsetOption
from fedvit.cli.output import console, plain, show_rows
from fedvit.errors import UsageError

app = typer.Typer(help="List, register, validate and reinstate clients.", no_args_is_help=True)
channel = typer.Typer(help="The mailbox for vehicles that cannot reach the control API.", no_args_is_help=True)

ClientArgument = Annotated[str, Argument(help="The client's id, as `fedvit clients list` shows it.")]
COLUMNS = (
    "client_id",
    "kind",
    "num_examples",
    "admitted_examples",
    "validated",
    "active",
    "last_seen_at",
    "quarantined_at",
)


@api_command(app, "list")
def list_clients(session: ApiSession, limit: LimitOption = 100, offset: OffsetOption = 0) -> object:
    """A page of clients, and the numbers of all, active and validated clients."""
    page = session.client.clients.status(limit, offset)
    if session.as_json:
        return page
    show_rows(plain(page.clients), *COLUMNS)
    console.print(f"[dim]{page.total} clients, {page.active} active, {page.validated} validated.[/]")
    return None


@api_command(app, "show")
def show_client(session: ApiSession, client_id: ClientArgument) -> object:
    """One client and its conditions: connected, admitted, validated, active, quarantined."""
    return session.client.clients.get(client_id)


@api_command(app, "register", change=True)
def register(
    session: ApiSession,
    device_id: Annotated[str, Argument(help="The vehicle's own id.")],
    kind: Annotated[RemoteKind, Option("--kind", help="A vehicle, or a depot.")] = "remote",
    num_examples: Annotated[int, Option("--num-examples", min=0, help="Number of images it holds.")] = 0,
    capabilities: Annotated[str, Option("--capabilities", help="A JSON object: what it can do.")] = "{}",
) -> object:
    """Add a vehicle, or bring one back; registering twice is harmless."""
    clients, parsed = session.client.clients, _json_object(capabilities)
    return session.change(
        lambda: clients.register(device_id, kind=kind, num_examples=num_examples, capabilities=parsed),
        present=lambda: {"clients": clients.status(limit=1).total},
    )


@api_command(app, "receipt")
def receipt(
    session: ApiSession,
    client_id: ClientArgument,
    run_id: Annotated[str, Argument(help="The run, as `fedvit training status` shows it.")],
    round_index: Annotated[int, Argument(min=1, help="The round of the client's task.")],
) -> object:
    """Result of a client's update to a round: accepted, refused and why, or not taken."""
    return session.client.clients.receipt(client_id, run_id, round_index)


@api_command(app, "remove", confirm=True)
def remove(session: ApiSession, client_id: ClientArgument) -> object:
    """Remove a client with its task and its stored update; its record and its privacy spend remain."""
    question = f"Take {client_id} out of the active clients?"
    return _change(session, client_id, lambda: session.client.clients.remove(client_id), question)


@api_command(app, "validate", change=True)
def validate(
    session: ApiSession,
    client_id: ClientArgument,
    validated: Annotated[bool, Option("--good/--bad", help="Whether its data may be used for training.")] = True,
    reason: Annotated[str | None, Option("--reason", help="Why; kept in the audit trail.")] = None,
    num_examples: Annotated[
        int | None,
        Option("--num-examples", min=1, help="Most images to admit it with; by default as many as it registered."),
    ] = None,
) -> object:
    """Record the result of a check of a client's data; a good one admits a vehicle that registered itself."""
    clients = session.client.clients
    return _change(
        session, client_id, lambda: clients.validate(client_id, validated, reason=reason, num_examples=num_examples)
    )


@api_command(app, "reinstate", change=True)
def reinstate(
    session: ApiSession,
    client_id: ClientArgument,
    justification: Annotated[str, Option("--justification", help="Why it may train again.")],
) -> object:
    """Lift a client's quarantine."""
    return _change(session, client_id, lambda: session.client.clients.reinstate(client_id, justification))


@api_command(app, "heartbeat", change=True)
def heartbeat(
    session: ApiSession,
    client_id: ClientArgument,
    status: Annotated[HeartbeatStatus, Option("--status", help="State of the vehicle.")] = "ok",
    model_version: Annotated[str | None, Option("--model-version", help="The model that it runs.")] = None,
) -> object:
    """Send a heartbeat in a vehicle's name; vehicles send their own."""
    clients = session.client.clients
    return _change(session, client_id, lambda: clients.heartbeat(client_id, status=status, model_version=model_version))


@api_command(app, "connectivity")
def connectivity(session: ApiSession, limit: LimitOption = 100, offset: OffsetOption = 0) -> object:
    """Which clients are reachable, and whether the losses look like a network partition."""
    return session.client.clients.connectivity(limit, offset)


@api_command(app, "data-quality")
def data_quality(session: ApiSession, limit: LimitOption = 100, offset: OffsetOption = 0) -> object:
    """How far the clients' contributions can be trusted, and why not."""
    return session.client.clients.data_quality(limit, offset)


def _change(session: ApiSession, client_id: str, call: Callable[[], object], question: str | None = None) -> object:
    return session.change(call, present=lambda: session.client.clients.get(client_id), question=question)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"--capabilities {text!r} is no JSON object.", cure="""Write '{"camera": "front"}'.""")
    return value


@api_command(channel, "enable", change=True)
def enable(session: ApiSession) -> object:
    """Open the mailbox; harmless when repeated."""
    return session.change(session.client.communication.enable_backup, present=session.client.communication.backup)


@api_command(channel, "disable", change=True)
def disable(session: ApiSession) -> object:
    """Close the mailbox; harmless when repeated."""
    return session.change(session.client.communication.disable_backup, present=session.client.communication.backup)


@api_command(channel, "status")
def channel_status(session: ApiSession) -> object:
    """Whether the mailbox is open, and what went through it."""
    return session.client.communication.backup()
