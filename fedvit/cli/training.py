"""``fedvit training``: the training loop of a running system."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedvit.cli.api_session import ApiSession, asking
from fedvit.cli.common import (
    ConfigOption,
    DryRunOption,
    HomeOption,
    IfMatchOption,
    JsonOption,
    NoWaitOption,
    UrlOption,
    YesOption,
)
from fedvit.cli.control import POLL_S
from fedvit.cli.output import plain

if TYPE_CHECKING:
    from fedvit.api.training import ProgressView

app = typer.Typer(
    help="The training loop of a running system. `fedvit train` starts it and follows it to its end.",
    no_args_is_help=True,
)


@app.command("status")
def status(
    home: HomeOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Where the loop stands: run, round, loss, accuracy, epsilon."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.training.status())


@app.command("start")
def start(
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Begin or continue the run that the settings describe; harmless when it is under way."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        training = ask.client.training
        ask.show(ask.change(training.start, present=lambda: plain(training.status())))


@app.command("stop")
def stop(
    no_wait: NoWaitOption = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the loop after the round under way; `fedvit training start` continues it."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        training = ask.client.training
        progress = ask.change(
            training.stop, present=lambda: plain(training.status()), question="Stop training after this round?"
        )
        ask.show(progress if no_wait else _rested(ask, progress))


@app.command("restart")
def restart(
    client_selection: Annotated[
        Literal["validated_only", "any"] | None,
        typer.Option("--client-selection", help="Who may be drawn in the new run; left out, whoever may be now."),
    ] = None,
    no_wait: NoWaitOption = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the present run after its round and begin another from the base weights."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        training = ask.client.training
        operation = ask.change(
            lambda: training.restart(client_selection),
            present=lambda: plain(training.status()),
            question="End this run and begin another from the base weights?",
        )
        ask.finish(operation, no_wait=no_wait)


@app.command("config")
def configure(
    min_clients: Annotated[
        int | None, typer.Option("--min-clients", min=1, help="How many clients a round needs.")
    ] = None,
    wait_timeout: Annotated[
        float | None, typer.Option("--wait-timeout", min=0, help="Seconds that a round waits for them.")
    ] = None,
    if_match: IfMatchOption = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the next round goes by; with an option, change it for that round and all after it."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        training = ask.client.training
        if min_clients is None and wait_timeout is None:
            ask.show(training.config())
            return
        etag = None if if_match is None else f'"{if_match}"'
        changed = ask.change(
            lambda: training.configure(min_clients=min_clients, wait_timeout=wait_timeout, if_match=etag),
            present=lambda: plain(training.config()),
        )
        ask.show(changed)


def _rested(ask: ApiSession, progress: ProgressView) -> ProgressView:
    while progress.phase != "resting":
        time.sleep(POLL_S)
        progress = ask.client.training.status()
    return progress
