"""``fedvit simulate | sweep``: training runs in virtual time, and the search for the best configuration."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape
from typer import Option

from fedvit.cli.options import SYSTEM, Options, local_command, settings_from
from fedvit.cli.output import console, errors, print_json, print_step, progress_bar, show_table, stdout_for_json
from fedvit.cli.state import find_system
from fedvit.cli.supervisor import interruptible
from fedvit.errors import ConfigError, FedvitError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fedvit.config import Settings
    from fedvit.tools.simulation.run import Simulated
    from fedvit.tools.sweep.outcome import TrialOutcome


@local_command(options=("home", "data", "assignments", "as_json"))
def simulate(
    options: Options,
    configs: Annotated[
        list[Path] | None, Option("--config", "-c", help="YAML file of settings; one curve each (repeatable).")
    ] = None,
    vary: Annotated[
        list[str] | None,
        Option("--vary", help="One curve for each value: --vary training.aggregation=fedavg,median (repeatable)."),
    ] = None,
    seeds: Annotated[int, Option("--seeds", min=1, help="Runs a curve, with consecutive seeds.")] = 1,
    to: Annotated[Path | None, Option("--to", help="Folder of the report (default: simulation in the home).")] = None,
) -> None:
    """Train a simulated fleet in virtual time: delays, drop-outs and faults are drawn, data and learning are real.

    The loop, the rules, update validation and the buffer are those of a real run. Without Ray and without state; the
    report goes to index.html and summary.json. See the section `simulation` of `fedvit config show`.
    """
    from fedvit.tools.report.simulation import summary_of, write_report

    planned = list(planned_runs(configs, options.data, options.assignments or (), vary or (), seeds, options.home))
    runs = _run_simulations(planned)
    target = planned[0][1].simulation.target_accuracy
    folder = to or planned[0][1].home / "simulation"
    write_report(folder, runs, target)
    summary = summary_of(runs, target)
    if options.as_json:
        print_json(summary)
    else:
        _show_simulation(summary, folder)


def planned_runs(
    configs: Sequence[Path] | None,
    data: Path | None,
    assignments: Sequence[str],
    vary: Sequence[str],
    seeds: int,
    home: Path | None = None,
) -> Iterator[tuple[str, Settings]]:
    """Name and settings of every run; the arguments are the options of :func:`simulate`.

    Raises:
        ConfigError: a setting is no good, or names a workload, which is not simulated.
    """
    from fedvit.clients.workload import check_no_workload

    varied = [_values(one) for one in vary]
    files: list[Path | None] = [*configs] if configs else [None]
    for config in files:
        for values in itertools.product(*varied):
            words = [config.stem] if config and (len(files) > 1 or not values) else []
            words += [f"{key.rpartition('.')[2]}={text}" for key, text in values]
            changes = [*assignments, *(f"{key}={text}" for key, text in values)]
            first = settings_from(config, home, data, changes)
            check_no_workload(first, "A simulation")
            for seed in range(seeds):
                simulation = first.simulation.model_copy(update={"seed": first.simulation.seed + seed})
                yield " ".join(words) or "run", first.model_copy(update={"simulation": simulation})


def _values(text: str) -> list[tuple[str, str]]:
    """Key and value, as ``--set`` takes them, of each setting in ``KEY=a,b`` or ``KEY=[a, {b: c}]``."""
    import yaml

    key, _, values = text.partition("=")
    try:
        parsed: Any = yaml.safe_load(values if values.startswith("[") else f"[{values}]")
    except yaml.YAMLError:
        parsed = None
    if not parsed:
        raise ConfigError(f"--vary {text!r} has no values.", cure="Write --vary section.key=a,b.")
    return [(key, yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]) for value in parsed]


def _run_simulations(planned: Sequence[tuple[str, Settings]]) -> list[Simulated]:
    import torch

    from fedvit.tools.simulation.run import SimulationObserver
    from fedvit.tools.simulation.run import simulate as run_simulation
    from fedvit.tools.simulation.world import ImageWorld

    # Threads only slow small models down.
    torch.set_num_threads(1)
    world, runs, before = None, [], 0
    total = sum(settings.training.rounds for _, settings in planned)
    with progress_bar(errors, quiet=False) as update:
        for number, (name, settings) in enumerate(planned, start=1):
            if world is None or not world.fits(settings):
                world = ImageWorld(settings)
            update(description=f"run {number}/{len(planned)}", total=total, text=name)

            def on_point(point: Any, before: int = before, name: str = name) -> None:
                accuracy = "" if point.accuracy is None else f"accuracy {point.accuracy:.3f}, "
                text = f"{accuracy}{point.hours:.2f} virtual hours: {name}"
                update(completed=before + point.round_index, text=text)

            runs.append(run_simulation(settings, world, name, SimulationObserver(on_point)))
            # A run may end before its last round, at the target accuracy.
            before += settings.training.rounds
            update(completed=before)
    return runs


def _show_simulation(summary: dict[str, Any], folder: Path) -> None:
    from fedvit.tools.report.simulation import COLUMNS, run_rows, warning_of

    show_table(COLUMNS, (map(escape, row) for row in run_rows(summary)))
    if (warning := warning_of(summary)) is not None:
        console.print(f"[bold yellow]{warning}[/]")
    console.print(f"Report: {escape(str(folder / 'index.html'))}", soft_wrap=True)


@local_command(options=SYSTEM)
def sweep(
    options: Options,
    to: Annotated[Path | None, Option("--to", help="Folder of the sweep (default: sweep in the home).")] = None,
    plan: Annotated[bool, Option("--plan", help="Print the planned trials, and run none.")] = False,
) -> None:
    """Try out configurations in virtual time, on real data, and choose one; see the section `sweep` of the settings.

    A second call after an interruption goes on: finished trials are not run again, and failed ones are. The folder has
    trials.parquet, index.html, summary.json, and best.yaml, which `fedvit run --config` takes.
    """
    with interruptible():
        from fedvit.clients.workload import check_no_workload
        from fedvit.tools.sweep.checks import check_rules, check_trials
        from fedvit.tools.sweep.journal import Journal
        from fedvit.tools.sweep.space import plan_sweep, rungs_of

        settings, as_json = options.settings(), options.as_json
        plans = plan_sweep(settings)
        rungs = rungs_of(settings)
        folder = to or settings.home / "sweep"
        if plan:
            check_rules(plans)
            _show_plan([(p.trial_id, dict(p.parameters), p.epsilon) for p in plans], rungs, as_json)
            return
        check_no_workload(settings, "A sweep")
        journal = Journal(folder)
        journal.check(settings)
        if len(journal.finished(plans)) < len(plans):
            check_trials(plans)
        failure = None
        with journal.working(settings):
            try:
                _run_trials(settings, folder, len(plans), len(journal.finished(plans)), as_json)
            except FedvitError as error:
                failure = error
            if failure is None or journal.outcomes(plans):
                from fedvit.tools.report.sweep import write_report

                summary = write_report(folder, settings, plans, journal.outcomes(plans))
                if not as_json:
                    _show_sweep(summary, folder)
        if failure is not None:
            raise failure
        if as_json:
            print_json(summary)


def _run_trials(settings: Settings, folder: Path, total: int, done: int, quiet: bool) -> None:
    if done == total:
        return
    if done:
        print_step(f"{done} of {total} trials are finished already", quiet=quiet)
    numbers = iter(range(done + 1, total + 1))
    with stdout_for_json(quiet), progress_bar(errors, quiet=quiet) as update:
        update(description=f"trial {done}/{total}", total=total, completed=done, text="none has ended yet")

        def on_outcome(outcome: TrialOutcome) -> None:
            score = "" if outcome.score is None else f", accuracy {outcome.score:.3f}"
            number, text = next(numbers, total), f"{outcome.status.replace('_', ' ')}{score}"
            update(description=f"trial {number}/{total}", completed=number, text=text)

        find_system(settings).sweep(folder, on_outcome)


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


def _show_sweep(summary: dict[str, Any], folder: Path) -> None:
    from fedvit.tools.report.simulation import warning_of
    from fedvit.tools.report.sweep import COLUMNS, trial_rows
    from fedvit.tools.sweep.outcome import FAILED

    show_table(COLUMNS, (map(escape, row) for row in trial_rows(summary)))
    for sentence in summary["cost"]["sentences"]:
        console.print(escape(sentence))
    if (warning := warning_of(summary)) is not None:
        console.print(f"[bold yellow]{warning}[/]")
    console.print(f"Report: {escape(str(folder / 'index.html'))}", soft_wrap=True)
    failed = sum(one["status"] == FAILED for one in summary["trials"])
    if failed:
        console.print(f"[bold yellow]{failed} trials failed. The same command runs them again.[/]")
    if summary["chosen"] is None:
        console.print("[bold yellow]No trial came to an end within the budget: nothing was chosen.[/]")
    else:
        console.print(f"Chosen: {escape(summary['chosen']['text'])}. Start it:")
        console.print(f"  {escape(summary['chosen']['command'])}", soft_wrap=True)
