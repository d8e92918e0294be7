"""``fedvit privacy``: what is spent and what is left, and answering for a state that came from a backup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape

from fedvit.cli.api_session import asking
from fedvit.cli.common import (
    ConfigOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    SetOption,
    UrlOption,
    YesOption,
    console,
    explained,
    print_json,
    settings_from,
)
from fedvit.cli.output import plain

app = typer.Typer(help="The privacy budget and its ledger.", no_args_is_help=True)


@app.command("show")
def show(home: HomeOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """The budget as the state folder's ledger has it, whose hash chain is verified on the way."""
    with explained(as_json):
        from fedvit.cli.state import open_existing_store
        from fedvit.privacy.accountant import PrivacyAccountant

        settings = settings_from(config, home)
        store = open_existing_store(settings)
        entries = store.verify_ledger()
        report = PrivacyAccountant(store, settings).budget(outlook=True)
        facts = {**asdict(report), "epsilon_remaining": report.epsilon_remaining, "ledger_entries": entries}
        if as_json:
            print_json(facts)
            return
        _print(facts)


def _print(facts: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(f"[bold]{key.replace('_', ' ')}[/]", _shown(value))
    console.print(table)


def _shown(value: Any) -> str:
    match value:
        case float():
            return f"{value:.4g}"
        case {"incident_id": incident, "reason": reason}:
            return escape(f"{incident}: {reason}")
    return "–" if value is None else str(value)


@app.command("selection-cost")
def selection_cost(
    trials: Annotated[float, typer.Option("--trials", min=1, help="How many trials a sweep has on average.")],
    shape: Annotated[
        float, typer.Option("--shape", min=0, help="Of the number of trials: 0 is logarithmic, 1 geometric.")
    ] = 1.0,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a sweep over private data costs when only its best trial is published, beside what one trial costs.

    A trial is a whole run with these settings. The promise needs a secret, random number of trials.
    """
    with explained(as_json):
        from fedvit.privacy.round_cost import run_spend
        from fedvit.privacy.selection import selection_cost as cost_of

        settings = settings_from(config, assignments=assignments)
        delta = settings.privacy.target_delta
        facts = asdict(cost_of(run_spend(settings), mean_trials=trials, delta=delta, shape=shape))
        if as_json:
            print_json(facts)
            return
        _print(facts)


@app.command("unfreeze")
def unfreeze(
    justification: Annotated[str, typer.Option("--justification", help="Who decided it, and how it is known.")],
    home: HomeOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer for it that nothing was charged since the backup that this state comes from; it may be spent from again.

    An incident's freeze is not lifted by it.
    """
    with explained(as_json):
        from fedvit.api.justification import checked_justification
        from fedvit.cli.state import audit_local, open_existing_store
        from fedvit.errors import ConflictError, UsageError

        try:
            reason = checked_justification(justification)
        except ValueError as error:
            raise UsageError("That is no justification.", cure=f"With --justification {error}.") from None
        with open_existing_store(settings_from(config, home)) as store:
            lifted = store.thaw_restored_ledger()
            if lifted is None:
                raise ConflictError(
                    "No backup's freeze is on this ledger.", cure="An incident's is lifted by its stand-down."
                )
            audit_local(store, "CLI privacy unfreeze", {"justification": reason, "frozen_at": lifted.at.isoformat()})
            still = store.ledger_freeze()
        if as_json:
            print_json({"lifted": asdict(lifted), "still_frozen": asdict(still) if still else None})
        else:
            console.print("Lifted." if still is None else f"Lifted; incident {still.incident_id} still freezes it.")


@app.command("budget")
def budget(
    home: HomeOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """What a running system has spent and has left, for its most exposed client."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.privacy.budget())


@app.command("history")
def history(
    hours: Annotated[float, typer.Option("--hours", min=0, help="How far back.")] = 24,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="How many lines at most.")] = 1000,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """The ledger's lines of the last hours, oldest first."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.privacy.history(hours, limit))


@app.command("periods")
def periods(
    home: HomeOption = None, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Every budget that was granted anew: what, why and by whom."""
    with asking(home, url, config, as_json) as ask:
        ask.show(ask.client.privacy.periods())


@app.command("reset-budget")
def reset_budget(
    new_epsilon: Annotated[float, typer.Argument(min=0, help="The epsilon of the new period.")],
    justification: Annotated[str, typer.Option("--justification", help="Why, in words; kept for ever.")],
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Begin a new period of the budget; clients lose more privacy by it. Needs a token of scope admin."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        privacy = ask.client.privacy
        outcome = ask.change(
            lambda: privacy.reset_budget(new_epsilon, justification),
            present=lambda: plain(privacy.budget()),
            question=f"Let every client lose another epsilon of {new_epsilon:g}?",
        )
        ask.show(outcome)


@app.command("approve")
def approve(
    request_id: Annotated[str, typer.Argument(help="What `fedvit privacy reset-budget` answered.")],
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put another administrator's reset of the budget in force. Needs a token of scope admin."""
    with asking(home, url, config, as_json, dry_run=dry_run, yes=yes) as ask:
        privacy = ask.client.privacy
        outcome = ask.change(
            lambda: privacy.approve_reset(request_id),
            present=lambda: plain(privacy.budget()),
            question=f"Put the reset {request_id} in force?",
        )
        ask.show(outcome)
