"""``fedvit aggregation``: whether rounds wait for their cohort."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fedvit.cli.api_session import asking
from fedvit.cli.common import ConfigOption, DryRunOption, HomeOption, IfMatchOption, JsonOption, UrlOption
from fedvit.cli.output import plain
from fedvit.errors import UsageError

app = typer.Typer(help="How updates become a model.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep ``aggregation`` a group while it has one command."""


@app.command("mode")
def mode(
    wanted: Annotated[
        Literal["synchronous", "asynchronous"] | None,
        typer.Argument(help="The mode to change to; left out, only show it."),
    ] = None,
    staleness_tolerance: Annotated[
        int | None, typer.Option("--staleness-tolerance", min=0, max=1000, help="How many versions behind is too old.")
    ] = None,
    buffer_size: Annotated[
        int | None, typer.Option("--buffer-size", min=1, help="How many updates are folded at a time.")
    ] = None,
    if_match: IfMatchOption = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whether rounds wait for their cohort, or fold whatever arrives."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        aggregation = ask.client.aggregation
        if wanted is None:
            if (staleness_tolerance, buffer_size, if_match) != (None, None, None):
                raise UsageError("The mode to change to is missing.", cure="Name synchronous or asynchronous.")
            ask.show(aggregation.mode())
            return
        etag = None if if_match is None else f'"{if_match}"'
        changed = ask.change(
            lambda: aggregation.set_mode(
                wanted, staleness_tolerance=staleness_tolerance, buffer_size=buffer_size, if_match=etag
            ),
            present=lambda: plain(aggregation.mode()),
        )
        ask.show(changed)
