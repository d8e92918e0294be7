"""``fedvit incident``: what went wrong, what was done about it, and the report."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from fedvit.cli.api_session import asking
from fedvit.cli.common import (
    ConfigOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    LimitOption,
    OffsetOption,
    UrlOption,
    console,
)
from fedvit.cli.output import plain, show_fields, show_rows

app = typer.Typer(help="The incident log.", no_args_is_help=True)

IncidentArgument = Annotated[str, typer.Argument(help="The incident, such as INC-2026-1124-001.")]


class Status(StrEnum):
    """Which incidents are listed."""

    OPEN = "open"
    RESOLVED = "resolved"


class Section(StrEnum):
    """Where in the report a note goes; a remark goes into the timeline."""

    REMARK = "remark"
    ROOT_CAUSE = "root_cause"
    BUSINESS_IMPACT = "business_impact"
    RESOLUTION = "resolution"
    PREVENTION = "prevention"
    ACTION_ITEM = "action_item"


@app.command("list")
def list_(
    status: Annotated[Status | None, typer.Option("--status", help="Only open, or only resolved ones.")] = None,
    limit: LimitOption = 50,
    offset: OffsetOption = 0,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Incidents, newest first."""
    with asking(home, url, config, as_json) as ask:
        columns = ("incident_id", "severity", "status", "alertname", "opened_at", "resolved_at", "firing", "summary")
        ask.show(ask.client.incidents.list(status, limit, offset), *columns)


@app.command("show")
def show(
    incident_id: IncidentArgument,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """One incident: its timeline, and what the runbook says to do about it."""
    with asking(home, url, config, as_json) as ask:
        found = ask.client.incidents.get(incident_id)
        if as_json:
            ask.show(found)
            return
        facts = plain(found)
        steps, lines = facts.pop("proposals"), facts.pop("timeline")
        show_fields(facts)
        console.print("\n[bold]what the runbook says[/]")
        for step in steps:
            _show_step(step)
        console.print("\n[bold]timeline[/]")
        show_rows([line | {"at": line["at"][:19]} for line in lines], "at", "kind", "actor", "text")


@app.command("note")
def note(
    incident_id: IncidentArgument,
    text: Annotated[str, typer.Argument(help="What you know.")],
    section: Annotated[Section, typer.Option("--section", help="Where in the report it goes.")] = Section.REMARK,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write down what only people know; notes are added, never changed."""
    with asking(home, url, config, as_json, dry_run=dry_run) as ask:
        noted = ask.change(
            lambda: ask.client.incidents.add_note(incident_id, text, section=section),
            present=lambda: {"status": ask.client.incidents.get(incident_id).status},
        )
        if as_json:
            ask.show(noted)
        else:
            console.print(f"Noted for {noted.incident_id}.", highlight=False)


@app.command("report")
def report(
    incident_id: IncidentArgument,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """The runbook's template in Markdown, filled with what is known and blank where only people know."""
    with asking(home, url, config, as_json) as ask:
        text = ask.client.incidents.report(incident_id)
        if as_json:
            ask.show({"report": text})
        else:
            typer.echo(text, nl=False)


def _show_step(step: dict[str, str | None]) -> None:
    """As it can be typed: a table would break its lines."""
    told = {"allowed": "automatic", "not_allowed": "not automatic", "never": "never automatic"}[str(step["automatic"])]
    became = f"; {step['outcome']}: {step['detail'] or 'under way'}" if step["outcome"] else ""
    console.print(f"[bold]{step['name']}[/] ({told}{became})", highlight=False)
    typer.echo(step["command"])
