"""``fedvit config | data``: the settings in force, and the data set that they name."""

from __future__ import annotations

import typer

from fedvit.cli.options import SYSTEM, Options, local_command
from fedvit.cli.output import console, print_json

app = typer.Typer(help="The settings.", no_args_is_help=True)
data = typer.Typer(help="The data set and its partition over clients.", no_args_is_help=True)


@local_command(app, "show", options=SYSTEM)
def show_settings(options: Options) -> None:
    """Every setting as ``fedvit up`` would use it now: defaults, then the file, then the environment, then options."""
    import yaml

    settings = options.settings().model_dump(mode="json")
    if options.as_json:
        print_json(settings)
    else:
        # YAML, so that it can be saved and given to --config.
        typer.echo(yaml.safe_dump(settings, sort_keys=False), nl=False)


@local_command(data, "inspect", options=("config", "data", "assignments", "as_json"))
def inspect_data(options: Options) -> None:
    """Classes, sizes, clients, label skew, duplicates and the content hash of the configured data set."""
    from fedvit.data.fleet import VirtualFleet
    from fedvit.data.manifest import inspect

    fleet = VirtualFleet.open(options.settings().data)
    facts = inspect(fleet.source, tuple(fleet.parts.values()))
    if options.as_json:
        print_json(facts)
    else:
        console.print_json(data=facts)
