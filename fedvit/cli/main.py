"""The ``fedvit`` command. Heavy modules are imported by the commands that need them, not here."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from fedvit.cli import access, clients, incident, maintenance, model, monitoring, privacy, research, system, training

app = typer.Typer(
    name="fedvit",
    help="Federated training and edge serving of Vision Transformers under differential privacy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

PANELS: dict[str, dict[str, typer.Typer | Callable[..., None]]] = {
    "Train": {
        "run": system.run,
        "training": training.app,
        "aggregation": training.aggregation,
        "finetune": training.finetune,
    },
    "Operate a running system": {
        "up": system.up,
        "down": system.down,
        "status": system.status,
        "health-check": maintenance.health_check,
        "logs": maintenance.logs,
        "diagnostics": maintenance.diagnostics,
        "model": model.app,
        "operation": system.operation,
    },
    "Monitor and respond to incidents": {
        "monitoring": monitoring.app,
        "metrics": monitoring.metrics,
        "drift": monitoring.drift,
        "incident": incident.app,
        "emergency": incident.emergency,
        "drill": incident.drill,
    },
    "Privacy and access": {"privacy": privacy.app, "token": access.token, "audit-log": access.audit_log},
    "Fleet": {"clients": clients.app, "backup-channel": clients.channel},
    "State and settings": {
        "backup": maintenance.backup,
        "restore": maintenance.restore,
        "config": maintenance.config,
        "data": maintenance.data,
    },
    "Research": {"simulate": research.simulate, "sweep": research.sweep},
}
for panel, entries in PANELS.items():
    for name, entry in entries.items():
        if isinstance(entry, typer.Typer):
            app.add_typer(entry, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(entry)


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
    for stream in (sys.stdout, sys.stderr):
        # A message may quote a file name that the terminal's encoding cannot show.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Classes that settings name are also found in the working directory; actors of Ray look there, too. It comes last,
    # so that no file in it replaces an installed module.
    sys.path.append(os.getcwd())
    app()


if __name__ == "__main__":
    main()
