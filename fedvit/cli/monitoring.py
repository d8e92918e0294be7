"""``fedvit drift | metrics | monitoring``: what is watched, and by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedvit.cli.api_session import asking
from fedvit.cli.common import ConfigOption, HomeOption, JsonOption, UrlOption, explained, settings_from

app = typer.Typer(help="Prometheus and Alertmanager beside the system.", no_args_is_help=True)


@app.command()
def catalogue() -> None:
    """Print docs/metrics.md: every metric, its labels and what it means."""
    from fedvit.metrics.catalogue import markdown

    typer.echo(markdown(), nl=False)


@app.command()
def rules(
    factor: Annotated[float, typer.Option(help="How many times as fast as in service: for drills.")] = 1.0,
    table: Annotated[bool, typer.Option(help="Print them as a table of docs/monitoring.md instead.")] = False,
) -> None:
    """Print the alert rules of the checkout, for Prometheus."""
    import yaml

    from fedvit.metrics.alert_rules import RULES, markdown, read_groups, shortened

    with explained():
        groups = shortened(read_groups(RULES), factor)
        typer.echo(markdown(groups) if table else yaml.safe_dump({"groups": groups}, sort_keys=False, width=120))


@app.command()
def dashboards(folder: Annotated[Path, typer.Argument(help="Where Grafana looks for them.")]) -> None:
    """Write the Grafana dashboards: training, privacy, fleet, edge, serving."""
    from fedvit.metrics.dashboards import write_dashboards

    for path in write_dashboards(folder):
        typer.echo(path)


@app.command()
def run(
    home: HomeOption = None,
    config: ConfigOption = None,
    factor: Annotated[
        float, typer.Option(help="How many times as fast as in service: for drills.", envvar="MONITORING_FACTOR")
    ] = 1.0,
    prometheus_port: Annotated[int, typer.Option(help="Where Prometheus listens, on loopback.")] = 9090,
    alertmanager_port: Annotated[int, typer.Option(help="Where Alertmanager listens, on loopback.")] = 9093,
) -> None:
    """Run Prometheus and Alertmanager with the alerts of the checkout, until Ctrl-C."""
    from fedvit.cli.supervisor import sigterm_unwinds
    from fedvit.tools.monitoring_stack import Watchers, watching

    watchers = Watchers(factor, prometheus_port, alertmanager_port)
    try:
        with explained(), sigterm_unwinds(), watching(settings_from(config, home), watchers) as attend:
            typer.echo(f"Prometheus: http://{watchers.prometheus}\nAlertmanager: http://{watchers.alertmanager}")
            attend()
    except KeyboardInterrupt:
        typer.echo("Stopped.")


def drift(
    home: HomeOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Whether what vehicles see has moved away from what the model learned, signal by signal."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.monitoring.data_drift())


def metrics(
    home: HomeOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """The metrics of every process of the node, as Prometheus reads them."""
    with asking(home, url, config, as_json) as ask:
        text = ask.client.system.metrics()
        if as_json:
            ask.show({"exposition": text})
        else:
            typer.echo(text, nl=False)
