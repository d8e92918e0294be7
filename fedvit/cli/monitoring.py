"""``fedvit drift | metrics | monitoring``: data drift, metrics, and Prometheus with its alerts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from fedvit.cli.api_session import ApiSession, api_command
from fedvit.cli.options import Options, local_command, report_errors

app = typer.Typer(help="Prometheus, Alertmanager and Grafana beside the system.", no_args_is_help=True)


@app.command()
def catalogue() -> None:
    """Print docs/reference/metrics.md: every metric, its labels and what it means."""
    from fedvit.metrics.catalogue import markdown

    typer.echo(markdown(), nl=False)


@app.command()
def rules(
    factor: Annotated[float, Option(help="Speed of the alert rules against service: for drills.")] = 1.0,
    table: Annotated[bool, Option(help="Print docs/reference/alerts.md instead.")] = False,
) -> None:
    """Print the alert rules of the checkout, for Prometheus."""
    import yaml

    from fedvit.metrics.alert_rules import RULES, markdown, read_groups, shortened

    with report_errors():
        groups = shortened(read_groups(RULES), factor)
        typer.echo(
            markdown(groups) if table else yaml.safe_dump({"groups": groups}, sort_keys=False, width=120), nl=False
        )


@app.command()
def dashboards(folder: Annotated[Path, Argument(help="Folder that Grafana reads.")]) -> None:
    """Write the Grafana dashboards: training, privacy, fleet, edge, serving."""
    from fedvit.metrics.dashboards import write_dashboards

    for path in write_dashboards(folder):
        typer.echo(path)


@app.command()
@local_command(options=("home", "config"))
def run(
    options: Options,
    factor: Annotated[
        float, Option(help="Speed of the alert rules against service: for drills.", envvar="MONITORING_FACTOR")
    ] = 1.0,
    prometheus_port: Annotated[int, Option(help="Port of Prometheus, on loopback.")] = 9090,
    alertmanager_port: Annotated[int, Option(help="Port of Alertmanager, on loopback.")] = 9093,
) -> None:
    """Run Prometheus and Alertmanager with the alerts of the checkout, until Ctrl-C."""
    from fedvit.cli.supervisor import sigterm_unwinds
    from fedvit.tools.monitoring_stack import MonitoringStack, run_monitoring

    stack = MonitoringStack(factor, prometheus_port, alertmanager_port)
    try:
        with sigterm_unwinds(), run_monitoring(options.settings(), stack) as wait:
            typer.echo(f"Prometheus: http://{stack.prometheus}\nAlertmanager: http://{stack.alertmanager}")
            wait()
    except KeyboardInterrupt:
        typer.echo("Stopped.")


@api_command()
def drift(session: ApiSession) -> object:
    """Whether the vehicles' images have moved away from the training data, signal by signal."""
    return session.client.monitoring.data_drift()


@api_command()
def metrics(session: ApiSession) -> object:
    """The metrics of every process of the node, in the format of Prometheus."""
    text = session.client.system.metrics()
    if session.as_json:
        return {"exposition": text}
    typer.echo(text, nl=False)
    return None
