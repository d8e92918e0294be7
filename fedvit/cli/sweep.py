"""``fedvit sweep``: hyper-parameter search in simulated runs, its privacy cost, and the best configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape
from typer import Option

from fedvit.cli.options import Options, local_command
from fedvit.cli.output import console, errors, print_json, print_step, show_table, stdout_for_json
from fedvit.cli.state import find_system
from fedvit.cli.supervisor import interruptible

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedvit.config import Settings
    from fedvit.tools.sweep.outcome import TrialOutcome


@local_command(options=("config", "data", "assignments", "as_json"))
def sweep(
    options: Options,
    to: Annotated[Path | None, Option("--to", help="Folder of the sweep (default: sweep in the home).")] = None,
    plan: Annotated[bool, Option("--plan", help="Print the planned trials, and run none.")] = False,
) -> None:
    """Try out configurations in virtual time, on real data, and choose one; see the section `sweep` of the settings.

    A second call after an interruption goes on: finished trials are not run again. The folder has trials.parquet,
    index.html, summary.json, and best.yaml, which `fedvit run --config` takes.
    """
    with interruptible():
        from fedvit.tools.sweep.journal import Journal
        from fedvit.tools.sweep.space import plan_sweep, rungs_of

        settings, as_json = options.settings(), options.as_json
        plans = plan_sweep(settings)
        rungs = rungs_of(settings)
        folder = to or settings.home / "sweep"
        if plan:
            _show_plan([(p.trial_id, dict(p.parameters), p.epsilon) for p in plans], rungs, as_json)
            return
        _check_settings(settings)
        journal = Journal(folder)
        journal.check(settings)
        with journal.working(settings):
            _run(settings, folder, len(plans), len(journal.finished(plans)), as_json)
            from fedvit.tools.report.sweep import write_report

            summary = write_report(folder, settings, plans, journal.finished(plans))
        if as_json:
            print_json(summary)
        else:
            _show(summary, folder)


def _check_settings(settings: Settings) -> None:
    """Check what every trial needs, once and before the first trial.

    Raises:
        FedvitError: the data cannot be opened, or the workload is not of images.
    """
    from fedvit.data.fleet import VirtualFleet
    from fedvit.errors import ConfigError

    if settings.workload.clients_class is not None:
        raise ConfigError(
            "A sweep simulates vehicles with images; workload.clients_class names others.",
            cure="Leave workload.clients_class out.",
        )
    VirtualFleet.open(settings.data)


def _run(settings: Settings, folder: Path, total: int, done: int, quiet: bool) -> None:
    if done == total:
        return
    if done:
        print_step(f"{done} of {total} trials are finished already", quiet=quiet)
    with stdout_for_json(quiet), errors.status("Starting Ray") as status:
        find_system(settings).sweep(folder, _progress_callback(status.update, total, done))


def _progress_callback(update: Callable[[str], Any], total: int, done: int) -> Callable[[TrialOutcome], None]:
    numbers = iter(range(done + 1, total + 1))

    def on_outcome(outcome: TrialOutcome) -> None:
        score = "" if outcome.score is None else f", accuracy {outcome.score:.3f}"
        update(f"{next(numbers, total)} of {total} trials; {outcome.trial_id}: {outcome.status}{score}")

    return on_outcome


def _show_plan(trials: list[tuple[str, dict[str, Any], float]], rungs: tuple[int, ...], as_json: bool) -> None:
    if as_json:
        plans = [
            {"trial_id": i, "parameters": p, "planned_epsilon": e if math.isfinite(e) else None} for i, p, e in trials
        ]
        print_json({"trials": plans, "rungs": list(rungs)})
        return
    rows = [(i, *(escape(f"{value}") for value in p.values()), f"{epsilon:.3f}") for i, p, epsilon in trials]
    show_table(("Trial", *trials[0][1], "Epsilon at most"), rows)
    console.print(f"Compared after {', '.join(map(str, rungs))} rounds." if rungs else "Every trial runs to its end.")


def _show(summary: dict[str, Any], folder: Path) -> None:
    from fedvit.tools.report.sweep import COLUMNS, trial_rows

    show_table(COLUMNS, (map(escape, row) for row in trial_rows(summary)))
    for sentence in summary["cost"]["sentences"]:
        console.print(escape(sentence))
    console.print(f"Report: {escape(str(folder / 'index.html'))}", soft_wrap=True)
    if summary["chosen"] is None:
        console.print("[bold yellow]No trial came to an end within the budget: nothing was chosen.[/]")
    else:
        console.print(f"Chosen: {escape(summary['chosen']['text'])}. Start it:")
        console.print(f"  {escape(summary['chosen']['command'])}", soft_wrap=True)
