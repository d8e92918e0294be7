"""``fedvit drill``: rehearsal of an incident on a real, temporary system."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from fedvit.cli.options import Options, local_command
from fedvit.cli.output import console, print_json
from fedvit.cli.supervisor import interruptible


@local_command(options=("as_json",))
def drill(
    options: Options,
    names: Annotated[list[str] | None, Argument(metavar="NAME...", help="Which drills; `all`, or `short`.")] = None,
    list_: Annotated[bool, Option("--list", help="List the drills, and run none.")] = False,
    docs: Annotated[Path | None, Option(help="Also write drills.json and drills.md into this folder.")] = None,
) -> None:
    """Cause an incident on a real system, and resolve it as the runbook says; status 1 unless all drills pass.

    It runs in the folder of a checkout, on the real ports and in a temporary state folder. The incidents of a system in
    service are in `fedvit incident`.
    """
    # A signal must not leave a system running.
    with interruptible():
        from fedvit.errors import UsageError
        from fedvit.incidents.drills.engine import run_drills
        from fedvit.incidents.drills.registry import drills_named
        from fedvit.incidents.drills.report import as_dicts, show_drills, show_result, show_table, write_docs

        if list_:
            show_drills(console, options.as_json)
            return
        if not names:
            raise UsageError("No drill is named.", cure="Name some, or `all`; `fedvit drill --list` shows them.")

        def say(line: str) -> None:
            typer.echo(line, err=True)

        results = run_drills(drills_named(names), Path.cwd(), say, lambda result: say(show_result(result)))
        if docs is not None:
            write_docs(docs, results, f"fedvit drill {' '.join(names)}")
        if options.as_json:
            print_json(as_dicts(results))
        else:
            show_table(console, results)
        if any(result.verdict == "failed" for result in results):
            raise typer.Exit(1)
