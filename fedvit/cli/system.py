"""``fedvit run | up | down | status | train``: the whole system."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from fedvit.cli.common import (
    ConfigOption,
    DataOption,
    HomeOption,
    JsonOption,
    SetOption,
    console,
    explained,
    find_system,
    print_json,
    running_system,
    settings_from,
)
from fedvit.cli.control import check_token, follow_training, sentence, user_token
from fedvit.cli.facts import facts_of
from fedvit.cli.supervisor import (
    end_this_process,
    interruptible,
    spawn_supervisor,
    stop_process,
    supervise,
    supervisor_log,
)
from fedvit.errors import FedvitError, StateError

if TYPE_CHECKING:
    from fedvit.config import Settings
    from fedvit.ports import SystemUrls


def run(
    config: ConfigOption = None,
    home: HomeOption = None,
    data: DataOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train, publish, serve, query every test image, report; then stop what was started.

    Run again, it continues the same state: an interrupted run goes on at its round, a finished one is reported again.
    """
    with explained(as_json), interruptible():
        settings = settings_from(config, home, data, assignments)
        seconds: dict[str, float] = {}
        with _system(settings, quiet=as_json, seconds=seconds) as urls:
            with _timed(seconds, "training"):
                progress = follow_training(urls.control, settings, quiet=as_json)
            if progress.status == "failed":
                raise FedvitError(f"Training failed: {progress.message}", cure="Mend the cause, then run again.")
            from fedvit.tools.report.measure import measure

            summary = measure(settings, urls, seconds, quiet=as_json, token=user_token())
        if as_json:
            print_json(summary)


def train(
    config: ConfigOption = None,
    home: HomeOption = None,
    data: DataOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Begin or continue the training run and follow it to its end; on a running system, or on one started for it."""
    with explained(as_json), interruptible():
        settings = settings_from(config, home, data, assignments)
        with _system(settings, quiet=as_json, seconds={}) as urls:
            progress = follow_training(urls.control, settings, quiet=as_json)
        if as_json:
            print_json(progress.model_dump(mode="json"))
        else:
            console.print(sentence(progress))
        if progress.status == "failed":
            raise typer.Exit(1)


def up(
    config: ConfigOption = None,
    home: HomeOption = None,
    data: DataOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay attached; end with Ctrl-C.")] = False,
) -> None:
    """Start the system, begin or continue training, and leave it running."""
    with explained(as_json):
        settings = settings_from(config, home, data, assignments)
        if foreground:
            supervise(settings)
            return
        running = running_system(settings.home)
        if running is None:
            spawn_supervisor(settings, _teller(as_json))
            running = running_system(settings.home)
        if running is None:
            raise StateError("The system ended right after its start.", cure=f"See {supervisor_log(settings)}.")
        _tell_urls(running.urls, as_json)


def down(home: HomeOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Stop the running system gracefully: after the round under way, with everything saved."""
    with explained(as_json):
        settings = settings_from(config, home)
        running = running_system(settings.home)
        if running is None:
            stopped = False
        else:
            stop_process(running.pid)
            stopped = True
        if as_json:
            print_json({"stopped": stopped})
        else:
            console.print("Stopped." if stopped else f"Nothing runs on {settings.home}.")


def status(home: HomeOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Whether the system runs, where training stands and what is left of the privacy budget."""
    with explained(as_json):
        settings = settings_from(config, home)
        facts = facts_of(settings)
        if as_json:
            print_json(facts)
            return
        from rich.table import Table

        table = Table(show_header=False, box=None)
        for key, value in facts.items():
            table.add_row(f"[bold]{key.replace('_', ' ')}[/]", str(value))
        console.print(table)


@contextlib.contextmanager
def _system(settings: Settings, *, quiet: bool, seconds: dict[str, float]) -> Iterator[SystemUrls]:
    """The system that runs on this state folder already, or one that lives as long as the block."""
    running = running_system(settings.home)
    if running is not None:
        yield running.urls
        return
    check_token(settings)
    started_s = time.monotonic()
    # Ray prints what it thinks its user should know; where a program reads, standard output holds one JSON document.
    aside = contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext()
    with aside, find_system(settings).running(_teller(quiet), end_this_process, train=False) as urls:
        seconds["start"] = time.monotonic() - started_s
        yield urls


def _teller(quiet: bool) -> Callable[[str], None]:
    def tell(step: str) -> None:
        if not quiet:
            console.print(f"[dim]•[/] {step}")

    return tell


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started_s = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - started_s


def _tell_urls(urls: SystemUrls, as_json: bool) -> None:
    places = {"control": urls.control, "inference": urls.inference}
    places |= {f"edge-{i}": url for i, url in enumerate(urls.edges, start=1)}
    if urls.dashboard:
        places["dashboard"] = urls.dashboard
    if as_json:
        print_json(places)
        return
    for name, url in places.items():
        console.print(f"[bold]{name:<10}[/] {url}")
    console.print("[dim]`fedvit status` tells where training stands; `fedvit down` stops everything.[/]")
