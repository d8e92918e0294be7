"""``fedvit run | up | down | status | operation``: the whole system, and its long operations."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer import Argument, Option

from fedvit.api.choices import ShutdownMode
from fedvit.cli.api_session import POLL_S, ApiSession, api_command, api_session, control_client, environment_token
from fedvit.cli.options import SYSTEM, LimitOption, NoWaitOption, OffsetOption, Options, local_command
from fedvit.cli.output import console, plain, print_json, print_step, show, show_text
from fedvit.cli.state import named_edges, running_system, settings_in_force
from fedvit.cli.supervisor import (
    interruptible,
    spawn_supervisor,
    stop_process,
    supervise,
    supervisor_log,
    temporary_system,
)
from fedvit.cli.training import follow_training, show_end
from fedvit.errors import ControlApiError, ControlUnreachableError, FedvitError, StateError
from fedvit.types import OperationStatus

if TYPE_CHECKING:
    from fedvit.config import Settings

T = TypeVar("T")

SHUTDOWN_TIMEOUT_S = 120.0
operation = typer.Typer(help="List, follow and cancel long operations.", no_args_is_help=True)

OperationArgument = Annotated[str, Argument(help="The operation's id, as `fedvit operation list` shows it.")]


@local_command(options=SYSTEM)
def run(options: Options) -> None:
    """Train, publish, serve, query every test image, report; then stop what was started.

    A second call continues the same state: an interrupted run goes on at its round, a finished one is reported again.
    With other settings it begins another run. It reports the release of its own run only; status 2 if there is none.
    The model of a workload is trained only.
    """
    with interruptible():
        settings = settings_in_force(options)
        seconds: dict[str, float] = {}
        with temporary_system(settings, quiet=options.as_json, seconds=seconds) as urls:
            started_s = time.monotonic()
            progress = follow_training(urls.control, settings, quiet=options.as_json)
            seconds["training"] = time.monotonic() - started_s
            if progress.status == "failed":
                raise FedvitError(
                    f"Training failed after {progress.rounds_done} of {progress.rounds_total} rounds, with epsilon "
                    f"{progress.epsilon:.3f} spent: {progress.message}",
                    cure="Mend the cause, then run again.",
                )
            if settings.workload.clients_class is not None:
                # Its model is not released, so there is nothing to serve and to query.
                show_end(progress, options.as_json)
                return
            from fedvit.tools.report.measure import measure

            token = environment_token()
            summary = measure(settings, urls, seconds, run_id=progress.run_id, quiet=options.as_json, token=token)
        if options.as_json:
            print_json(summary)


@local_command(options=SYSTEM)
def up(
    options: Options,
    foreground: Annotated[bool, Option("--foreground", help="Stay attached; end with Ctrl-C.")] = False,
) -> None:
    """Start the system, begin or continue training, and leave it running."""
    settings = settings_in_force(options)
    if foreground:
        supervise(settings)
        return
    running = running_system(settings.home)
    if running is None:
        spawn_supervisor(settings, functools.partial(print_step, quiet=options.as_json))
        running = running_system(settings.home)
    if running is None:
        raise StateError("The system ended right after its start.", cure=f"See {supervisor_log(settings)}.")
    urls = running.urls
    addresses = {"control": urls.control, "inference": urls.inference, **named_edges(urls)}
    addresses |= {"dashboard": urls.dashboard} if urls.dashboard else {}
    if options.as_json:
        print_json(addresses)
        return
    for name, url in addresses.items():
        console.print(f"[bold]{name:<10}[/] {url}")
    console.print("[dim]`fedvit status` shows the state of training; `fedvit down` stops everything.[/]")


@local_command(options=("yes", "dry_run", "home", "url", "config", "as_json"))
def down(
    options: Options,
    mode: Annotated[
        ShutdownMode | None,
        Option("--mode", help="Shut down through the control API: after the present round, or at once."),
    ] = None,
    save_state: Annotated[bool, Option("--save-state/--no-save-state", help="Save the state first.")] = True,
    no_wait: NoWaitOption = False,
) -> None:
    """Stop the running system after the present round, with everything saved.

    By default it sends a signal to the process on --home, which needs no token and is harmless when nothing runs. With
    --url, --mode, --no-save-state, --no-wait or --dry-run the control API shuts the system down, after a confirmation.
    """
    if options.named_url or mode or no_wait or options.dry_run or not save_state:
        with api_session(options) as session:
            _shut_down(session, mode or "graceful", save_state, no_wait)
        return
    home = options.settings().home
    running = running_system(home)
    if running is not None:
        stop_process(running.pid)
    show_text(
        f"Nothing runs on {home}." if running is None else "Stopped.", {"stopped": bool(running)}, options.as_json
    )


def _shut_down(session: ApiSession, mode: ShutdownMode, save_state: bool, no_wait: bool) -> None:
    client = session.client
    operation = session.change(
        lambda: client.system.shutdown(mode, save_state=save_state),
        present=lambda: {
            "system": (health := client.system.health()).status,
            "training": plain(health.training),
            "operations_under_way": plain(tuple(each for each in client.operations.iterate() if not each.status.ended)),
        },
        question=f"Shut the whole system down ({mode})?",
    )
    if no_wait:
        session.show(operation)
        return
    # The system may end before it can report that the operation did.
    result = _answer(lambda: client.operations.wait(operation))
    if result is not None and result.status != "succeeded":
        session.finish(result)
    deadline_s = time.monotonic() + SHUTDOWN_TIMEOUT_S
    while _answer(client.system.healthz) is not None or (
        session.options.named_url is None and running_system(session.settings.home) is not None
    ):
        if time.monotonic() > deadline_s:
            raise FedvitError(
                f"The system still runs {SHUTDOWN_TIMEOUT_S:g} s after its shutdown.", cure="See `fedvit logs`."
            )
        time.sleep(POLL_S)
    session.show({"stopped": True, "operation_id": operation.operation_id})


def _answer(call: Callable[[], T]) -> T | None:
    """What the control API answers, or None when it is gone."""
    try:
        return call()
    except (ControlUnreachableError, ControlApiError):
        return None


@local_command()
def status(options: Options) -> None:
    """Whether the system runs, the state of training, and what is left of the privacy budget."""
    show(system_facts(options.settings()), options.as_json)


def system_facts(settings: Settings) -> dict[str, Any]:
    """Status, rounds, release and epsilon, from the running system or else from the state folder; JSON types only."""
    running = running_system(settings.home)
    if running is None:
        return {"system": "down", **_stored_facts(settings)}
    try:
        with control_client(running.urls.control, settings) as client:
            health, budget = client.system.health(), client.privacy.budget()
    except FedvitError as error:
        return {"system": f"not answering ({error})", "pid": running.pid, **_stored_facts(settings)}
    facts = {"system": health.status, "pid": running.pid, "control": running.urls.control, "parts": dict(health.parts)}
    training = health.training
    if training is None:
        return {**facts, **_stored_facts(settings)}
    return {
        **facts,
        "training": training.status or "not started",
        "reason": training.message,
        "rounds_done": training.rounds_done,
        "rounds_total": training.rounds_total,
        "accuracy": training.accuracy,
        "release": health.release,
        "epsilon_spent": budget.epsilon_spent,
        "epsilon_remaining": budget.epsilon_remaining,
    }


def _stored_facts(settings: Settings) -> dict[str, Any]:
    if not (settings.home / "state.db").exists():
        return {"state": f"none at {settings.home}"}
    from fedvit.privacy.accountant import PrivacyAccountant
    from fedvit.store.store import Store

    store = Store.open(settings.home)
    run, release = store.runs.latest(), store.releases.current()
    budget = PrivacyAccountant(store, settings).budget()
    return {
        "training": run.status.value if run else "not started",
        "reason": run.reason if run else None,
        "rounds_done": run.rounds_done if run else 0,
        "rounds_total": run.rounds_total if run else settings.training.rounds,
        "release": release.version if release else None,
        "epsilon_spent": budget.epsilon_spent,
        "epsilon_remaining": budget.epsilon_remaining,
    }


@api_command(
    operation, "list", columns=("operation_id", "kind", "status", "progress", "stage", "created_at", "ended_at")
)
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


@api_command(operation, "show")
def show_operation(session: ApiSession, operation_id: OperationArgument) -> object:
    """One operation: its progress and its result."""
    return session.client.operations.get(operation_id)


@api_command(operation, "cancel", change=True)
def cancel_operation(session: ApiSession, operation_id: OperationArgument) -> object:
    """End it early: at once while it is queued, at its next step while it runs; harmless after its end."""
    operations = session.client.operations
    return session.change(lambda: operations.cancel(operation_id), present=lambda: operations.get(operation_id))


@api_command(operation, "wait")
def wait_for_operation(
    session: ApiSession,
    operation_id: OperationArgument,
    timeout_s: Annotated[
        float | None, Option("--timeout", min=0, help="Longest wait, in seconds; the operation goes on.")
    ] = None,
) -> None:
    """Wait until it has ended; status 1 unless it succeeded."""
    session.finish(session.client.operations.get(operation_id), timeout_s=timeout_s)
