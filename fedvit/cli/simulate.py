"""``fedvit simulate``: runs in virtual time, side by side."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvit.cli.common import DataOption, JsonOption, SetOption, console, errors, explained, print_json, settings_from
from fedvit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fedvit.config import Settings
    from fedvit.tools.simulation.run import Simulated

ConfigsOption = Annotated[
    list[Path] | None, typer.Option("--config", "-c", help="YAML file of settings; one curve each (repeatable).")
]
VaryOption = Annotated[
    list[str] | None,
    typer.Option("--vary", help="One curve for each value: --vary training.aggregation=fedavg,median (repeatable)."),
]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="So many runs a curve, with one seed after another.")]
ToOption = Annotated[Path | None, typer.Option("--to", help="Folder of the report (default: simulation in the home).")]


def simulate(
    configs: ConfigsOption = None,
    data: DataOption = None,
    assignments: SetOption = None,
    vary: VaryOption = None,
    seeds: SeedsOption = 1,
    to: ToOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a simulated fleet in virtual time: delays, drop-outs and faults are drawn, data and learning are real.

    The loop, the rules, update validation and the buffer are those of a real run. No Ray, no state: the report goes to
    index.html and summary.json. See the section `simulation` of `fedvit config show`.
    """
    with explained(as_json):
        from fedvit.tools.report.simulation import summary_of, write_report

        planned = list(_planned(configs, data, assignments, vary, seeds))
        runs = _run_all(planned)
        target = planned[0][1].simulation.target_accuracy
        folder = to or planned[0][1].home / "simulation"
        write_report(folder, runs, target)
        summary = summary_of(runs, target)
    if as_json:
        print_json(summary)
    else:
        _show(summary, folder)


def _planned(
    configs: list[Path] | None, data: Path | None, assignments: list[str] | None, vary: list[str] | None, seeds: int
) -> Iterator[tuple[str, Settings]]:
    """Name and settings of every run."""
    varied = [_values(one) for one in vary or []]
    files: list[Path | None] = [*configs] if configs else [None]
    for config in files:
        for chosen in itertools.product(*varied):
            words = [config.stem] if config and (len(files) > 1 or not chosen) else []
            words += [f"{key.rpartition('.')[2]}={text}" for key, text in chosen]
            changes = [*(assignments or []), *(f"{key}={text}" for key, text in chosen)]
            first = settings_from(config, None, data, changes)
            for seed in range(seeds):
                simulation = first.simulation.model_copy(update={"seed": first.simulation.seed + seed})
                yield " ".join(words) or "run", first.model_copy(update={"simulation": simulation})


def _values(text: str) -> list[tuple[str, str]]:
    """Key and value, as ``--set`` takes them, of each setting that ``KEY=a,b`` or ``KEY=[a, {b: c}]`` stands for."""
    import yaml

    key, _, values = text.partition("=")
    try:
        found: Any = yaml.safe_load(values if values.startswith("[") else f"[{values}]")
    except yaml.YAMLError:
        found = None
    if not found:
        raise ConfigError(f"--vary {text!r} has no values.", cure="Write --vary section.key=a,b.")
    return [(key, yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]) for value in found]


def _run_all(planned: Sequence[tuple[str, Settings]]) -> list[Simulated]:
    import torch

    from fedvit.tools.simulation.run import simulate as simulated
    from fedvit.tools.simulation.world import ImageWorld

    # One client after another on a small model: threads would wait for each other.
    torch.set_num_threads(1)
    world, runs = None, []
    for name, settings in planned:
        if world is None or not world.fits(settings):
            world = ImageWorld(settings)
        with errors.status(f"{name}, seed {settings.simulation.seed}") as status:

            def told(point: Any, status: Any = status, title: str = f"{name}, seed {settings.simulation.seed}") -> None:
                accuracy = "" if point.accuracy is None else f", accuracy {point.accuracy:.3f}"
                status.update(f"{title}: version {point.round_index}, {point.hours:.2f} virtual hours{accuracy}")

            runs.append(simulated(settings, world, name, told))
    return runs


def _show(summary: dict[str, Any], folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from fedvit.tools.report.simulation import COLUMNS, NOT_PRIVATE, run_rows

    table = Table(*COLUMNS, box=None)
    for row in run_rows(summary):
        table.add_row(*map(escape, row))
    console.print(table)
    if not summary["private"]:
        console.print(f"[bold yellow]{NOT_PRIVATE}[/]")
    console.print(f"Report: {escape(str(folder / 'index.html'))}", soft_wrap=True)
