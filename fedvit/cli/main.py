"""The ``fedvit`` command. Heavy modules are imported by the commands that need them, not here."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from fedvit.cli import (
    access,
    clients,
    config,
    drill,
    finetune,
    incident,
    maintenance,
    model,
    monitoring,
    operation,
    privacy,
    simulate,
    sweep,
    system,
    training,
)

app = typer.Typer(
    name="fedvit",
    help="Federated training and edge serving of Vision Transformers under differential privacy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

TRAIN = "Train"
OPERATE = "Operate a running system"
MONITOR = "Monitor and respond to incidents"
PRIVACY = "Privacy and access"
FLEET = "Fleet"
STATE = "State and settings"
RESEARCH = "Research"

app.command("run", rich_help_panel=TRAIN)(system.run)
app.add_typer(training.app, name="training", rich_help_panel=TRAIN)
app.add_typer(training.aggregation, name="aggregation", rich_help_panel=TRAIN)
app.command("finetune", rich_help_panel=TRAIN)(finetune.finetune)
app.command("up", rich_help_panel=OPERATE)(system.up)
app.command("down", rich_help_panel=OPERATE)(system.down)
app.command("status", rich_help_panel=OPERATE)(system.status)
app.command("health-check", rich_help_panel=OPERATE)(maintenance.health_check)
app.command("logs", rich_help_panel=OPERATE)(maintenance.logs)
app.command("diagnostics", rich_help_panel=OPERATE)(maintenance.diagnostics)
app.add_typer(model.app, name="model", rich_help_panel=OPERATE)
app.add_typer(operation.app, name="operation", rich_help_panel=OPERATE)
app.add_typer(monitoring.app, name="monitoring", rich_help_panel=MONITOR)
app.command("metrics", rich_help_panel=MONITOR)(monitoring.metrics)
app.command("drift", rich_help_panel=MONITOR)(monitoring.drift)
app.add_typer(incident.app, name="incident", rich_help_panel=MONITOR)
app.add_typer(incident.emergency, name="emergency", rich_help_panel=MONITOR)
app.command("drill", rich_help_panel=MONITOR)(drill.drill)
app.add_typer(privacy.app, name="privacy", rich_help_panel=PRIVACY)
app.add_typer(access.token, name="token", rich_help_panel=PRIVACY)
app.add_typer(access.audit_log, name="audit-log", rich_help_panel=PRIVACY)
app.add_typer(clients.app, name="clients", rich_help_panel=FLEET)
app.add_typer(clients.channel, name="backup-channel", rich_help_panel=FLEET)
app.command("backup", rich_help_panel=STATE)(maintenance.backup)
app.command("restore", rich_help_panel=STATE)(maintenance.restore)
app.add_typer(config.app, name="config", rich_help_panel=STATE)
app.add_typer(config.data, name="data", rich_help_panel=STATE)
app.command("simulate", rich_help_panel=RESEARCH)(simulate.simulate)
app.command("sweep", rich_help_panel=RESEARCH)(sweep.sweep)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"fedvit {importlib.metadata.version('fedvit')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the ``fedvit`` command itself."""


def main() -> None:
    """Console entry point."""
    app()


if __name__ == "__main__":
    main()
