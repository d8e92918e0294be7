"""``fedvit clients``: who learns, who is heard, whose data can be trusted."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

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
    YesOption,
    console,
)
from fedvit.cli.output import plain, show_rows
from fedvit.errors import UsageError

app = typer.Typer(help="The clients: who learns, who is heard, whose data can be trusted.", no_args_is_help=True)

ClientArgument = Annotated[str, typer.Argument(help="The client's id, as `fedvit clients list` shows it.")]
COLUMNS = ("client_id", "kind", "num_examples", "validated", "active", "last_seen_at", "quarantined_at")


@app.command("list")
def list_clients(
    limit: LimitOption = 100,
    offset: OffsetOption = 0,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """A page of clients, and how many there are, are active and are validated."""
    with asking(home, url, config, as_json) as ask:
        found = ask.client.clients.status(limit, offset)
        if as_json:
            ask.show(found)
            return
        show_rows(plain(found.clients), *COLUMNS)
        console.print(f"[dim]{found.total} clients, {found.active} active, {found.validated} validated.[/]")


@app.command("show")
def show_client(
    client_id: ClientArgument,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """One client and its conditions: connected, validated, active, quarantined."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.clients.get(client_id))


@app.command("register")
def register(
    device_id: Annotated[str, typer.Argument(help="The vehicle's own id.")],
    kind: Annotated[Literal["remote", "silo"], typer.Option("--kind", help="A vehicle, or a depot.")] = "remote",
    num_examples: Annotated[int, typer.Option("--num-examples", min=0, help="How many images it holds.")] = 0,
    capabilities: Annotated[str, typer.Option("--capabilities", help="A JSON object: what it can do.")] = "{}",
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a vehicle, or bring one back; registering twice is harmless."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        clients, able = ask.client.clients, _json_object(capabilities)
        client = ask.change(
            lambda: clients.register(device_id, kind=kind, num_examples=num_examples, capabilities=able),
            present=lambda: {"clients": clients.status(limit=1).total},
        )
        ask.show(client)


@app.command("receipt")
def receipt(
    client_id: ClientArgument,
    run_id: Annotated[str, typer.Argument(help="The run, as `fedvit training status` shows it.")],
    round_index: Annotated[int, typer.Argument(min=1, help="The round that the client was asked in.")],
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What became of a client's update to a round: accepted, refused and why, or not taken."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.clients.receipt(client_id, run_id, round_index))


@app.command("remove")
def remove(
    client_id: ClientArgument,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a client out of the active list; its record and its privacy spend remain."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        client = ask.change(
            lambda: ask.client.clients.remove(client_id),
            present=lambda: plain(ask.client.clients.get(client_id)),
            question=f"Take {client_id} out of the active clients?",
        )
        ask.show(client)


@app.command("validate")
def validate(
    client_id: ClientArgument,
    validated: Annotated[bool, typer.Option("--good/--bad", help="Whether its data may be learned from.")] = True,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; kept in the audit trail.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say that a client's data was checked, and how that came out."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        client = ask.change(
            lambda: ask.client.clients.validate(client_id, validated, reason=reason),
            present=lambda: plain(ask.client.clients.get(client_id)),
        )
        ask.show(client)


@app.command("reinstate")
def reinstate(
    client_id: ClientArgument,
    justification: Annotated[str, typer.Option("--justification", help="Why it may learn again.")],
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lift a client's quarantine."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        client = ask.change(
            lambda: ask.client.clients.reinstate(client_id, justification),
            present=lambda: plain(ask.client.clients.get(client_id)),
        )
        ask.show(client)


@app.command("heartbeat")
def heartbeat(
    client_id: ClientArgument,
    status: Annotated[Literal["ok", "degraded"], typer.Option("--status", help="How the vehicle is.")] = "ok",
    model_version: Annotated[str | None, typer.Option("--model-version", help="Which model it runs.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say in a vehicle's name that it is there; vehicles do so themselves."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        heard = ask.change(
            lambda: ask.client.clients.heartbeat(client_id, status=status, model_version=model_version),
            present=lambda: plain(ask.client.clients.get(client_id)),
        )
        ask.show(heard)


@app.command("connectivity")
def connectivity(
    limit: LimitOption = 100,
    offset: OffsetOption = 0,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Who is heard and who is not, and whether that looks like a network partition."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.clients.connectivity(limit, offset))


@app.command("data-quality")
def data_quality(
    limit: LimitOption = 100,
    offset: OffsetOption = 0,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """How far the clients' contributions can be trusted, and why not."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.clients.data_quality(limit, offset))


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"--capabilities {text!r} is no JSON object.", cure="""Write '{"camera": "front"}'.""")
    return found
