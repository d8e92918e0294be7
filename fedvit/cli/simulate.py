"""``fedvit simulate``: training runs in virtual time, compared in one report."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape
from typer import Option

from fedvit.cli.options import Options, local_command, settings_from
from fedvit.cli.output import console, errors, print_json, show_table
from fedvit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fedvit.config import Settings
    from fedvit.tools.simulation.run import Simulated


@local_command(options=("data", "assignments", "as_json"))
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

    planned = list(planned_runs(configs, options.data, options.assignments or (), vary or (), seeds))
    runs = _run_all(planned)
    target = planned[0][1].simulation.target_accuracy
    folder = to or planned[0][1].home / "simulation"
    write_report(folder, runs, target)
    summary = summary_of(runs, target)
    if options.as_json:
        print_json(summary)
    else:
        _show(summary, folder)


def planned_runs(
    configs: Sequence[Path] | None, data: Path | None, assignments: Sequence[str], vary: Sequence[str], seeds: int
) -> Iterator[tuple[str, Settings]]:
    """Name and settings of every run; the arguments are the options of :func:`simulate`.

    Raises:
        ConfigError: a setting of ``vary`` has no values, or see :func:`fedvit.settings.load_settings`.
    """
    varied = [_values(one) for one in vary]
    files: list[Path | None] = [*configs] if configs else [None]
    for config in files:
        for values in itertools.product(*varied):
            words = [config.stem] if config and (len(files) > 1 or not values) else []
            words += [f"{key.rpartition('.')[2]}={text}" for key, text in values]
            changes = [*assignments, *(f"{key}={text}" for key, text in values)]
            first = settings_from(config, None, data, changes)
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


def _run_all(planned: Sequence[tuple[str, Settings]]) -> list[Simulated]:
    import torch

    from fedvit.tools.simulation.run import simulate as run_simulation
    from fedvit.tools.simulation.world import ImageWorld

    # Threads only slow small models down.
    torch.set_num_threads(1)
    world, runs = None, []
    for name, settings in planned:
        if world is None or not world.fits(settings):
            world = ImageWorld(settings)
        title = f"{name}, seed {settings.simulation.seed}"
        with errors.status(title) as status:

            def on_point(point: Any, status: Any = status, title: str = title) -> None:
                accuracy = "" if point.accuracy is None else f", accuracy {point.accuracy:.3f}"
                status.update(f"{title}: version {point.round_index}, {point.hours:.2f} virtual hours{accuracy}")

            runs.append(run_simulation(settings, world, name, on_point))
    return runs


def _show(summary: dict[str, Any], folder: Path) -> None:
    from fedvit.tools.report.simulation import COLUMNS, NOT_PRIVATE, run_rows

    show_table(COLUMNS, (map(escape, row) for row in run_rows(summary)))
    if not summary["private"]:
        console.print(f"[bold yellow]{NOT_PRIVATE}[/]")
    console.print(f"Report: {escape(str(folder / 'index.html'))}", soft_wrap=True)
