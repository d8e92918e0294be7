"""``fedvit backup-channel``: the mailbox for vehicles that cannot reach the control API."""

from __future__ import annotations

import typer

from fedvit.cli.api_session import asking
from fedvit.cli.common import ConfigOption, DryRunOption, HomeOption, JsonOption, UrlOption
from fedvit.cli.output import plain

app = typer.Typer(help="The mailbox for vehicles that cannot reach the control API.", no_args_is_help=True)


@app.command("status")
def status(
    home: HomeOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Whether it is open, and what went through it."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.communication.backup())


@app.command("enable")
def enable(
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Open it; harmless when repeated."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        channel = ask.client.communication
        ask.show(ask.change(channel.enable_backup, present=lambda: plain(channel.backup())))


@app.command("disable")
def disable(
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Close it; harmless when repeated."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        channel = ask.client.communication
        ask.show(ask.change(channel.disable_backup, present=lambda: plain(channel.backup())))
