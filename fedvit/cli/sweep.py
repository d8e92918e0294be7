"""``fedvit sweep``: many simulated runs side by side, what they cost, and the one to take."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvit.cli.common import (
    ConfigOption,
    DataOption,
    JsonOption,
    SetOption,
    console,
    errors,
    explained,
    find_system,
    print_json,
    settings_from,
)
from fedvit.cli.supervisor import interruptible

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedvit.config import Settings
    from fedvit.tools.sweep.outcome import TrialOutcome

ToOption = Annotated[Path | None, typer.Option("--to", help="Folder of the sweep (default: sweep in the home).")]
PlanOption = Annotated[bool, typer.Option("--plan", help="Say which trials it would be, and run none.")]


def sweep(
    config: ConfigOption = None,
    data: DataOption = None,
    assignments: SetOption = None,
    to: ToOption = None,
    plan: PlanOption = False,
    as_json: JsonOption = False,
) -> None:
    """Try out configurations in virtual time, on real data, and choose one; see the section `sweep` of the settings.

    Repeated after an interruption, it goes on: finished trials are not run again. The folder has trials.parquet,
    index.html, summary.json, and best.yaml, which `fedvit run --config` takes.
    """
    with explained(as_json), interruptible():
        from fedvit.tools.sweep.journal import Journal
        from fedvit.tools.sweep.space import plan_sweep, rungs_of

        settings = settings_from(config, None, data, assignments)
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
    """What no trial could do without is said now, and not once a trial.

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
    if done and not quiet:
        console.print(f"[dim]•[/] {done} of {total} trials are finished already")
    # Ray prints what it thinks its user should know; where a program reads, standard output holds one JSON document.
    aside = contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext()
    with aside, errors.status("Starting Ray") as status:
        find_system(settings).sweep(folder, _teller(status.update, total, done))


def _teller(update: Callable[[str], Any], total: int, done: int) -> Callable[[TrialOutcome], None]:
    seen = iter(range(done + 1, total + 1))

    def tell(outcome: TrialOutcome) -> None:
        score = "" if outcome.score is None else f", accuracy {outcome.score:.3f}"
        update(f"{next(seen, total)} of {total} trials; {outcome.trial_id}: {outcome.status}{score}")

    return tell


def _show_plan(trials: list[tuple[str, dict[str, Any], float]], rungs: tuple[int, ...], as_json: bool) -> None:
    if as_json:
        told = [{"trial_id": i, "parameters": p, "planned_epsilon": _finite(e)} for i, p, e in trials]
        print_json({"trials": told, "rungs": list(rungs)})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("Trial", *trials[0][1], "Epsilon at most", box=None)
    for trial_id, parameters, epsilon in trials:
        table.add_row(trial_id, *(escape(f"{value}") for value in parameters.values()), f"{epsilon:.3f}")
    console.print(table)
    console.print(f"Compared after {', '.join(map(str, rungs))} rounds." if rungs else "Every trial runs to its end.")


def _finite(value: float) -> float | None:
    import math

    return value if math.isfinite(value) else None


def _show(summary: dict[str, Any], folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from fedvit.tools.report.sweep import COLUMNS, trial_rows

    table = Table(*COLUMNS, box=None)
    for row in trial_rows(summary):
        table.add_row(*map(escape, row))
    console.print(table)
    for sentence in summary["cost"]["sentences"]:
        console.print(escape(sentence))
    console.print(f"Report: {escape(str(folder / 'index.html'))}", soft_wrap=True)
    if summary["chosen"] is None:
        console.print("[bold yellow]No trial came to an end within the budget: nothing was chosen.[/]")
    else:
        console.print(f"Chosen: {escape(summary['chosen']['text'])}. Start it:")
        console.print(f"  {escape(summary['chosen']['command'])}", soft_wrap=True)
