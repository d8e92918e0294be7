"""``fedvit audit``: does this installation do what its accountant assumes?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fedvit.cli.common import ConfigOption, JsonOption, SetOption, console, explained, print_json, settings_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedvit.tools.audit.suite import Timed


def audit(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer models and modes: seconds instead of minutes.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="One check by its name (repeatable); see the first column.")
    ] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End at the first thing that is not right.")] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Audit the privacy of the configured model and mechanism; status 1 when anything is not as it is accounted for.

    Neighbouring data sets, white-box audits of released values, a run with planted canaries, noise, samples, charges.
    Trains models of its own in temporary folders; neither data nor state are touched. What users asked for and changed
    is in `fedvit audit-log`.
    """
    with explained(as_json):
        import torch

        from fedvit.tools.audit.findings import Scope
        from fedvit.tools.audit.suite import audit as findings_of

        # Small models: threads would wait for each other.
        torch.set_num_threads(1)
        scope = Scope.of(settings_from(config, assignments=assignments), quick=quick)
        found = []
        for timed in findings_of(scope, only or ()):
            found.append(timed)
            if fail_fast and not timed.finding.passed:
                break
    passed = all(timed.finding.passed for timed in found)
    if as_json:
        print_json({"passed": passed, "findings": [asdict(t.finding) | {"seconds": t.seconds} for t in found]})
    else:
        _show(found)
    if not passed:
        raise typer.Exit(1)


def _show(found: Sequence[Timed]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "", "claimed", "at least", "seen", box=None)
    for timed in found:
        finding = timed.finding
        verdict = "[green]pass[/]" if finding.passed else "[bold red]FAIL[/]"
        epsilons = ["" if e is None else f"{e:.3f}" for e in (finding.claimed_epsilon, finding.lower_bound)]
        name = escape(f"{finding.check}: {finding.subject}")
        table.add_row(name, verdict, *epsilons, escape(finding.detail))
    console.print(table)
