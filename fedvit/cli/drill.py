"""``fedvit drill``: rehearse an incident on a real system of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedvit.cli.common import JsonOption, console, explained, print_json


def drill(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Which; `all`, or `short`.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the drills, and run none.")] = False,
    docs: Annotated[Path | None, typer.Option(help="Write drills.json and drills.md into this folder, too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Break a real system on purpose, and get it out of trouble as the runbook says; status 1 unless all are green.

    It runs in the folder of a checkout, on the real ports and in a state folder that is thrown away.
    """
    from fedvit.cli.supervisor import interruptible

    # A signal must not leave a system behind.
    with explained(as_json), interruptible():
        from fedvit.errors import UsageError
        from fedvit.incidents.drills.engine import run_drills
        from fedvit.incidents.drills.registry import drills_named
        from fedvit.incidents.drills.report import as_dicts, show_drills, show_result, show_table, write_docs

        if list_:
            show_drills(console, as_json)
            return
        if not names:
            raise UsageError("No drill is named.", cure="Name some, or `all`; `fedvit drill --list` shows them.")

        def say(line: str) -> None:
            typer.echo(line, err=True)

        results = run_drills(drills_named(names), Path.cwd(), say, lambda result: say(show_result(result)))
        if docs is not None:
            write_docs(docs, results, f"fedvit drill {' '.join(names)}")
        if as_json:
            print_json(as_dicts(results))
        else:
            show_table(console, results)
        if any(result.verdict == "failed" for result in results):
            raise typer.Exit(1)
