"""``fedvit audit-log``: who asked for what, and what it changed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fedvit.cli.api_session import asking, url_given
from fedvit.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    console,
    explained,
    print_json,
    settings_from,
)
from fedvit.cli.output import plain, show_rows

app = typer.Typer(help="The audit trail of the control API.", no_args_is_help=True)


@app.command("show")
def show(
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many lines at most.")] = 50,
    after: Annotated[int | None, typer.Option("--after", min=0, help="Only lines behind this sequence.")] = None,
    home: HomeOption = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Ask a control API instead of the state folder (default: FEDVIT_URL).")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """The last lines, or those behind a sequence; oldest first."""
    if url_given(home, url) is not None:
        with asking(home, url, config, as_json) as ask:
            lines = plain(ask.client.audit.lines(limit, after))
    else:
        with explained(as_json):
            lines = _stored_lines(config, home, limit, after)
    if as_json:
        print_json(lines)
    else:
        show_rows(lines, "sequence", "at", "actor", "source", "action", "status", "request_id")


def _stored_lines(config: Path | None, home: Path | None, limit: int, after: int | None) -> list[dict[str, Any]]:
    from fedvit.cli.state import open_existing_store

    with open_existing_store(settings_from(config, home)) as store:
        entries = store.latest_audit(limit) if after is None else store.audit(after, limit)
    return [{"sequence": entry.sequence, "at": entry.at, **asdict(entry.facts)} for entry in entries]


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
