"""``fedvit audit-log``: who asked for what, and what it changed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fedvit.cli.common import ConfigOption, HomeOption, JsonOption, console, explained, print_json, settings_from

app = typer.Typer(help="The audit trail of the control API.", no_args_is_help=True)


@app.command("show")
def show(
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many lines at most.")] = 50,
    after: Annotated[int | None, typer.Option("--after", min=0, help="Only lines behind this sequence.")] = None,
    home: HomeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """The last lines, or those behind a sequence; oldest first."""
    with explained(as_json):
        from rich.markup import escape
        from rich.table import Table

        from fedvit.cli.state import open_existing_store

        with open_existing_store(settings_from(config, home)) as store:
            entries = store.latest_audit(limit) if after is None else store.audit(after, limit)
        if as_json:
            print_json([{"sequence": entry.sequence, "at": entry.at, **asdict(entry.facts)} for entry in entries])
            return
        table = Table("#", "at (UTC)", "actor", "from", "action", "status", "request", box=None)
        for entry in entries:
            facts = entry.facts
            cells = (f"{entry.at:%Y-%m-%d %H:%M:%S}", facts.actor, facts.source, facts.action)
            table.add_row(str(entry.sequence), *map(escape, cells), str(facts.status), escape(facts.request_id))
        console.print(table)


@app.command("verify")
def verify(home: HomeOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Recompute the trail's hash chain; status 1 when a line was changed, removed or added."""
    with explained(as_json):
        from fedvit.cli.state import open_existing_store

        with open_existing_store(settings_from(config, home)) as store:
            lines = store.verify_audit()
        if as_json:
            print_json({"ok": True, "lines": lines})
        else:
            console.print(f"The audit trail is intact: {lines} lines.", highlight=False)
