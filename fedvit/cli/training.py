"""``fedvit training | aggregation | finetune``: federated training, and fine-tuning of one model on several ranks."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from fedvit.api.choices import AggregationMode, ClientSelection
from fedvit.cli.api_session import POLL_S, ApiSession, api_command, control_client
from fedvit.cli.options import SYSTEM, IfMatchOption, NoWaitOption, Options, local_command
from fedvit.cli.output import (
    console,
    print_json,
    print_step,
    progress_bar,
    show_fields,
    show_text,
    show_traceback,
    stdout_for_json,
)
from fedvit.cli.state import find_system, settings_in_force
from fedvit.cli.supervisor import interruptible, temporary_system
from fedvit.errors import InterruptedRunError, UsageError

if TYPE_CHECKING:
    from fedvit.api.training import ProgressView
    from fedvit.config import Settings

app = typer.Typer(help="Run, follow, stop and configure training.", no_args_is_help=True)
aggregation = typer.Typer(help="How client updates become a model.", no_args_is_help=True)


@local_command(app, "run", options=SYSTEM)
def run(options: Options) -> None:
    """Begin or continue the training run and follow it to its end.

    It uses the system that runs on --home; without one, it starts a system and stops it afterwards.
    """
    with interruptible():
        settings = settings_in_force(options)
        with temporary_system(settings, quiet=options.as_json) as urls:
            progress = follow_training(urls.control, settings, quiet=options.as_json)
        show_end(progress, options.as_json)


def show_end(progress: ProgressView, as_json: bool) -> None:
    """Print how a run ended; status 1 when it failed."""
    status = (progress.status or "not started").replace("_", " ")
    text = f"{progress.run_id} is {status} after {progress.rounds_done} of {progress.rounds_total} rounds: "
    text += f"accuracy {_number(progress.accuracy)}, epsilon {_number(progress.epsilon)}."
    text += f" {progress.message}" if progress.message else ""
    show_text(text, progress.model_dump(mode="json"), as_json)
    if progress.status == "failed":
        if progress.failure is not None:
            show_traceback(progress.failure.traceback)
        raise typer.Exit(1)


@api_command(app, "status")
def status(session: ApiSession) -> object:
    """State of the training loop: run, round, loss, accuracy, epsilon."""
    return session.client.training.status()


@api_command(app, "start", change=True)
def start(session: ApiSession) -> object:
    """Begin or continue the run that the settings describe; harmless while it is under way."""
    return session.change(session.client.training.start, present=session.client.training.status)


@api_command(app, "stop", confirm=True)
def stop(session: ApiSession, no_wait: NoWaitOption = False) -> object:
    """End the loop after the present round; `fedvit training start` continues it."""
    training = session.client.training
    progress = session.change(training.stop, present=training.status, question="Stop training after this round?")
    while not no_wait and progress.phase != "resting":
        time.sleep(POLL_S)
        progress = training.status()
    return progress


@api_command(app, "restart", confirm=True)
def restart(
    session: ApiSession,
    client_selection: Annotated[
        ClientSelection | None,
        Option("--client-selection", help="Which clients may be drawn in the new run (default: unchanged)."),
    ] = None,
    no_wait: NoWaitOption = False,
) -> None:
    """End the present run after its round and begin another from the base weights."""
    training = session.client.training
    operation = session.change(
        lambda: training.restart(client_selection),
        present=training.status,
        question="End this run and begin another from the base weights?",
    )
    session.finish(operation, no_wait=no_wait)


@api_command(app, "config", change=True)
def configure(
    session: ApiSession,
    min_clients: Annotated[int | None, Option("--min-clients", min=1, help="Clients that a round needs.")] = None,
    wait_timeout: Annotated[
        float | None, Option("--wait-timeout", min=0, help="Longest wait for them, in seconds.")
    ] = None,
    if_match: IfMatchOption = None,
) -> object:
    """Show the parameters of the next round; with an option, change them for that round and all after it."""
    training = session.client.training
    if min_clients is None and wait_timeout is None:
        return training.config()
    return session.change(
        lambda: training.configure(min_clients=min_clients, wait_timeout=wait_timeout, if_match=_etag(if_match)),
        present=training.config,
    )


@api_command(aggregation, "mode", change=True)
def mode(
    session: ApiSession,
    new_mode: Annotated[
        AggregationMode | None,
        Argument(metavar="MODE", help="The mode to change to; without it, the present one is shown."),
    ] = None,
    staleness_tolerance: Annotated[
        int | None,
        Option("--staleness-tolerance", min=0, max=1000, help="Largest age of an update, in model versions."),
    ] = None,
    buffer_size: Annotated[
        int | None, Option("--buffer-size", min=1, help="Number of updates that are folded at a time.")
    ] = None,
    if_match: IfMatchOption = None,
) -> object:
    """Whether rounds wait for their cohort (synchronous) or fold updates as they arrive (asynchronous)."""
    group = session.client.aggregation
    if new_mode is not None:
        return session.change(
            lambda: group.set_mode(
                new_mode, staleness_tolerance=staleness_tolerance, buffer_size=buffer_size, if_match=_etag(if_match)
            ),
            present=group.mode,
        )
    if (staleness_tolerance, buffer_size, if_match) != (None, None, None):
        raise UsageError("The mode to change to is missing.", cure="Name synchronous or asynchronous.")
    return group.mode()


@local_command(options=SYSTEM)
def finetune(
    options: Options,
    ranks: Annotated[
        int | None, Option("--ranks", min=1, help="Number of training processes (default: finetune.ranks).")
    ] = None,
) -> None:
    """Train the configured model on all training images of the data set, privately, on several ranks (Ray Train).

    Record-level DP-SGD, charged to the state folder's ledger before each range of steps. A second call goes on from the
    last checkpoint; charged steps cost nothing more. See the section `finetune` of `fedvit config show`. Status 1 when
    the budget ended the job before its last step.
    """
    settings = options.settings(*([] if ranks is None else [f"finetune.ranks={ranks}"]))
    try:
        with stdout_for_json(options.as_json):
            report = find_system(settings).finetune(functools.partial(print_step, quiet=options.as_json))
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "Fine-tuning was interrupted.", cure="The same command goes on from its last checkpoint."
        ) from None
    facts = asdict(report)
    if options.as_json:
        print_json(facts)
    else:
        weights = facts.pop("weights")
        show_fields(facts)
        # Not in the table, which cuts long paths off.
        console.print(f"Weights: {weights or 'none yet'}", soft_wrap=True, markup=False, highlight=False)
    if report.stopped is not None:
        raise typer.Exit(1)


def _etag(revision: int | None) -> str | None:
    return None if revision is None else f'"{revision}"'


def follow_training(base_url: str, settings: Settings, *, quiet: bool) -> ProgressView:
    """Start training over the control API and follow it, with a progress bar, until it rests."""
    with control_client(base_url, settings) as client, progress_bar(console, quiet=quiet) as update:
        progress = client.training.start()
        while True:
            done, total = progress.rounds_done, progress.rounds_total
            numbers = "  ".join(
                f"{name} {_number(getattr(progress, name))}" for name in ("loss", "accuracy", "epsilon")
            )
            update(total=total, completed=done, description=f"round {done}/{total}", text=numbers)
            if progress.status not in (None, "running") and progress.phase == "resting":
                return progress
            time.sleep(POLL_S)
            progress = client.training.status()


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
