"""``fedvit drift | metrics | monitoring``: what is watched, and by whom."""

from __future__ import annotations

import typer

from fedvit.cli.asking import asking
from fedvit.cli.common import ConfigOption, HomeOption, JsonOption, UrlOption

app = typer.Typer(help="Prometheus and Alertmanager beside the system.", no_args_is_help=True)


@app.command()
def catalogue() -> None:
    """Print docs/metrics.md: every metric, its labels and what it means."""
    from fedvit.monitoring.catalogue import markdown

    typer.echo(markdown(), nl=False)


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
