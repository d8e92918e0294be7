"""``fedvit data``: what a run would learn from."""

from __future__ import annotations

import typer

from fedvit.cli.common import (
    ConfigOption,
    DataOption,
    JsonOption,
    SetOption,
    console,
    explained,
    print_json,
    settings_from,
)

app = typer.Typer(help="The data set and how it is dealt out.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep ``data`` a group while it has one command."""


@app.command("inspect")
def inspect_data(
    config: ConfigOption = None, data: DataOption = None, assignments: SetOption = None, as_json: JsonOption = False
) -> None:
    """Classes, sizes, clients, label skew, duplicates and the content hash of the configured data set."""
    with explained(as_json):
        from fedvit.data.fleet import VirtualFleet
        from fedvit.data.manifest import inspect

        settings = settings_from(config, data=data, assignments=assignments)
        fleet = VirtualFleet.open(settings.data)
        facts = inspect(fleet.source, tuple(fleet.parts.values()))
        if as_json:
            print_json(facts)
        else:
            console.print_json(data=facts)
