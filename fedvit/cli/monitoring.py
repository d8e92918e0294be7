"""``fedvit drift | metrics``: what is watched."""

from __future__ import annotations

import typer

from fedvit.cli.asking import asking
from fedvit.cli.common import ConfigOption, HomeOption, JsonOption, UrlOption


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
