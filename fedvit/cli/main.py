"""The ``fedvit`` command. Heavy modules are imported by the commands that need them, not here."""

from __future__ import annotations

import typer

from fedvit.cli import (
    aggregation,
    audit,
    backup_channel,
    clients,
    config,
    data,
    drill,
    emergency,
    finetune,
    incident,
    model,
    monitoring,
    operation,
    operations,
    privacy,
    privacy_audit,
    shutdown,
    simulate,
    sweep,
    system,
    token,
    training,
)

app = typer.Typer(
    name="fedvit",
    help="Federated training and edge serving of Vision Transformers under differential privacy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("run")(system.run)
app.command("up")(system.up)
app.command("down")(system.down)
app.command("status")(system.status)
app.command("train")(system.train)
app.command("shutdown")(shutdown.shutdown)
app.command("health-check")(operations.health_check)
app.command("backup")(operations.backup)
app.command("restore")(operations.restore)
app.command("diagnostics")(operations.diagnostics)
app.command("logs")(operations.logs)
app.command("finetune")(finetune.finetune)
app.command("simulate")(simulate.simulate)
app.command("sweep")(sweep.sweep)
app.command("audit")(privacy_audit.audit)
app.command("drill")(drill.drill)
app.command("drift")(monitoring.drift)
app.command("metrics")(monitoring.metrics)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(clients.app, name="clients")
app.add_typer(training.app, name="training")
app.add_typer(aggregation.app, name="aggregation")
app.add_typer(model.app, name="model")
app.add_typer(privacy.app, name="privacy")
app.add_typer(backup_channel.app, name="backup-channel")
app.add_typer(emergency.app, name="emergency")
app.add_typer(incident.app, name="incident")
app.add_typer(operation.app, name="operation")
app.add_typer(monitoring.app, name="monitoring")
app.add_typer(token.app, name="token")
app.add_typer(audit.app, name="audit-log")


def main() -> None:
    """Console entry point."""
    app()


if __name__ == "__main__":
    main()
