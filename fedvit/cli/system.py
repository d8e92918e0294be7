"""``fedvit run | up | down | status | train``: the whole system."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

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
from fedvit.config import Settings
from fedvit.errors import FedvitError, InterruptedRunError, StateError, UsageError
from fedvit.ports import SystemUrls

if TYPE_CHECKING:
    import httpx

POLL_S = 0.25
DOWN_TIMEOUT_S = 60.0


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
    with explained(as_json), _interruptible():
        settings = settings_from(config, home, data, assignments)
        seconds: dict[str, float] = {}
        with _system(settings, quiet=as_json, seconds=seconds) as urls:
            with _timed(seconds, "training"):
                progress = follow_training(urls, quiet=as_json)
            if progress["status"] == "failed":
                raise FedvitError(f"Training failed: {progress['message']}", cure="Mend the cause, then run again.")
            from fedvit.report.measure import measure

            summary = measure(settings, urls, seconds, quiet=as_json)
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
    with explained(as_json), _interruptible():
        settings = settings_from(config, home, data, assignments)
        with _system(settings, quiet=as_json, seconds={}) as urls:
            progress = follow_training(urls, quiet=as_json)
        if as_json:
            print_json(progress)
        else:
            console.print(_sentence(progress))
        if progress["status"] == "failed":
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
            _spawn_supervisor(settings, quiet=as_json)
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
            _stop_process(running.pid)
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


# --- a system to talk to ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _system(settings: Settings, *, quiet: bool, seconds: dict[str, float]) -> Iterator[SystemUrls]:
    """The system that runs on this state folder already, or one that lives as long as the block."""
    running = running_system(settings.home)
    if running is not None:
        yield running.urls
        return
    started_s = time.monotonic()
    with find_system(settings).running(_teller(quiet)) as urls:
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


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, and both end with one sentence."""

    def interrupt(_: int, __: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "Interrupted; everything committed is safe.", cure="The same command continues from there."
        ) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


# --- training --------------------------------------------------------------------------------------------------------


def follow_training(urls: SystemUrls, *, quiet: bool) -> dict[str, Any]:
    """Start training over the control API and follow it, with a progress bar, until it rests."""
    with _control(urls) as client, _progress_bar(quiet) as show:
        progress = _answer(client.post("/api/training/start"))
        show(progress)
        while progress["status"] in (None, "running") or progress["phase"] != "resting":
            time.sleep(POLL_S)
            progress = _answer(client.get("/api/training/status"))
            show(progress)
    return progress


@contextlib.contextmanager
def _control(urls: SystemUrls) -> Iterator[httpx.Client]:
    """The control API; a connection that fails is an error that fedvit understands."""
    # Imported here: `fedvit --help` need not pay for it.
    import httpx

    with httpx.Client(base_url=urls.control, timeout=60) as client:
        try:
            yield client
        except httpx.HTTPError as error:
            raise FedvitError(f"{urls.control} does not answer: {error}.", cure="See `make logs`.") from None


def _answer(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        try:
            detail = response.json()["detail"]
        except (ValueError, KeyError):
            detail = response.text[:200]
        raise FedvitError(f"The control API answered {response.status_code}: {detail}")
    return response.json()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _progress_bar(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]round"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}  epsilon {task.fields[epsilon]}"),
        TextColumn("[dim]{task.fields[phase]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task("", total=None, loss="–", accuracy="–", epsilon="–", phase="")

        def show(progress: dict[str, Any]) -> None:
            bar.update(
                task,
                total=progress["rounds_total"],
                completed=progress["rounds_done"],
                phase=progress["phase"],
                loss=_figure(progress["loss"]),
                accuracy=_figure(progress["accuracy"]),
                epsilon=_figure(progress["epsilon"]),
            )

        yield show


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _sentence(progress: dict[str, Any]) -> str:
    text = f"Training {progress['status']} after {progress['rounds_done']} of {progress['rounds_total']} rounds"
    text += f": accuracy {_figure(progress['accuracy'])}, epsilon {_figure(progress['epsilon'])}."
    return f"{text} {progress['message']}" if progress["message"] else text


# --- up and down -----------------------------------------------------------------------------------------------------


def supervisor_log(settings: Settings) -> Path:
    """Where the process that ``up`` leaves running writes what it has to say."""
    return settings.home / "logs" / "supervisor.log"


def supervise(settings: Settings, on_ready: Callable[[], None] = lambda: None) -> None:
    """What ``up`` leaves running: tell the steps as JSON lines, then wait for a signal.

    Raises:
        FedvitError: the system could not start; told as a line, too.
    """

    def tell(**fact: Any) -> None:
        # Whoever started us may be gone by the time we stop.
        with contextlib.suppress(BrokenPipeError, ValueError):
            print(json.dumps(fact), flush=True)

    try:
        with _interruptible(), find_system(settings).running(lambda step: tell(step=step)) as urls:
            with _control(urls) as client:
                _answer(client.post("/api/training/start"))
            on_ready()
            tell(ready=True)
            signal.pause()
    except InterruptedRunError:
        return
    except FedvitError as error:
        tell(error=error.message, cure=error.cure, exit_status=error.exit_status)
        raise


def _spawn_supervisor(settings: Settings, *, quiet: bool) -> None:
    log = supervisor_log(settings)
    command = [sys.executable, "-m", "fedvit.cli.supervisor"]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(settings.model_dump_json())
    child.stdin.close()
    tell = _teller(quiet)
    for line in child.stdout:
        fact = json.loads(line)
        if "step" in fact:
            tell(fact["step"])
        elif "error" in fact:
            child.wait()
            failure = UsageError if fact["exit_status"] == UsageError.exit_status else FedvitError
            raise failure(fact["error"], cure=fact["cure"])
        elif fact.get("ready"):
            return
    raise FedvitError(f"The system ended at its start with status {child.wait()}.", cure=f"See {log}.")


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


def _stop_process(pid: int) -> None:
    """SIGTERM, then wait for the end of the process itself."""
    try:
        handle = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([handle], [], [], DOWN_TIMEOUT_S)
    finally:
        os.close(handle)
    if not ended:
        raise FedvitError(
            f"Process {pid} did not end within {DOWN_TIMEOUT_S:g} s.", cure=f"See the logs, then `kill -9 {pid}`."
        )


# --- status ----------------------------------------------------------------------------------------------------------


def facts_of(settings: Settings) -> dict[str, Any]:
    """Where the system stands, from itself when it runs and from its store when it does not."""
    running = running_system(settings.home)
    if running is None:
        return {"system": "down", **_stored_facts(settings)}
    try:
        with _control(running.urls) as client:
            health = _answer(client.get("/api/system/health"))
            budget = _answer(client.get("/api/privacy/budget"))
    except FedvitError as error:
        return {"system": f"not answering ({error})", "pid": running.pid, **_stored_facts(settings)}
    training = health["training"] or {}
    return {
        "system": health["status"],
        "pid": running.pid,
        "control": running.urls.control,
        "parts": health["parts"],
        "training": training.get("status") or "not started",
        "rounds": f"{training.get('rounds_done', 0)} of {training.get('rounds_total', 0)}",
        "accuracy": training.get("accuracy"),
        "release": health["release"],
        "epsilon_spent": budget["epsilon_spent"],
        "epsilon_remaining": budget["epsilon_remaining"],
    }


def _stored_facts(settings: Settings) -> dict[str, Any]:
    if not (settings.home / "state.db").exists():
        return {"state": f"none at {settings.home}"}
    from fedvit.privacy.accountant import PrivacyAccountant
    from fedvit.store.store import Store

    store = Store.open(settings.home)
    run, release = store.latest_run(), store.current_release()
    budget = PrivacyAccountant(store, settings).budget()
    return {
        "training": run.status.value if run else "not started",
        "rounds": f"{run.rounds_done} of {run.rounds_total}" if run else "0",
        "release": release.version if release else None,
        "epsilon_spent": budget.epsilon_spent,
        "epsilon_remaining": budget.epsilon_remaining,
    }
