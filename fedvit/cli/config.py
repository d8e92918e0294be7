"""``fedvit config``: the settings that are in force."""

from __future__ import annotations

import typer

from fedvit.cli.common import (
    ConfigOption,
    DataOption,
    HomeOption,
    JsonOption,
    SetOption,
    explained,
    print_json,
    settings_from,
)

app = typer.Typer(help="The settings.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep ``config`` a group while it has one command."""


@app.command("show")
def show(
    config: ConfigOption = None,
    home: HomeOption = None,
    data: DataOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every setting as ``fedvit up`` would use it now: defaults, then the file, then the environment, then options."""
    with explained(as_json):
        import yaml

        settings = settings_from(config, home, data, assignments).model_dump(mode="json")
        if as_json:
            print_json(settings)
        else:
            # YAML, so that it can be saved and given to --config.
            typer.echo(yaml.safe_dump(settings, sort_keys=False), nl=False)
