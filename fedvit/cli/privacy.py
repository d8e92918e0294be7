"""``fedvit privacy``: the privacy budget, its ledger, and the audit of the installation."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer import Argument, Option

from fedvit.cli.api_session import ApiSession, api_command, read_api_or_store
from fedvit.cli.options import STATE_OR_API, Options, local_command
from fedvit.cli.output import print_json, show, show_table, show_text
from fedvit.cli.state import audit_local, open_existing_store

if TYPE_CHECKING:
    from fedvit.config import Settings
    from fedvit.store.store import Store
    from fedvit.tools.audit.suite import Timed

app = typer.Typer(help="The privacy budget, its ledger, and the privacy audit.", no_args_is_help=True)


@local_command(app, "show", options=STATE_OR_API)
def show_budget(options: Options) -> None:
    """The privacy budget of the most exposed client: spent, remaining, and the cost of the next round.

    It is read from the ledger of the state folder, whose hash chain is verified, or from the system at --url.
    """

    def from_store(store: Store, settings: Settings) -> dict[str, Any]:
        from fedvit.privacy.accountant import PrivacyAccountant

        entries = store.ledger.verify()
        report = PrivacyAccountant(store, settings).budget(outlook=True)
        return {**asdict(report), "epsilon_remaining": report.epsilon_remaining, "ledger_entries": entries}

    show(read_api_or_store(options, lambda client: client.privacy.budget(), from_store), options.as_json)


@api_command(app, "periods")
def periods(session: ApiSession) -> object:
    """Every new budget that was granted: how much, why and by whom."""
    return session.client.privacy.periods()


@api_command(app, "history")
def history(
    session: ApiSession,
    hours: Annotated[float, Option("--hours", min=0, help="How far back, in hours.")] = 24,
    limit: Annotated[int, Option("--limit", min=1, max=10_000, help="Largest number of lines.")] = 1000,
) -> object:
    """The ledger's lines of the last hours, oldest first."""
    return session.client.privacy.history(hours, limit)


@api_command(app, "reset-budget", confirm=True)
def reset_budget(
    session: ApiSession,
    new_epsilon: Annotated[float, Argument(min=0, help="The epsilon of the new period.")],
    justification: Annotated[str, Option("--justification", help="Why, in words; kept forever.")],
) -> object:
    """Begin a new period of the budget; clients lose more privacy by it. Needs a token of scope admin."""
    privacy = session.client.privacy
    return session.change(
        lambda: privacy.reset_budget(new_epsilon, justification),
        present=privacy.budget,
        question=f"Let every client lose another epsilon of {new_epsilon:g}?",
    )


@api_command(app, "approve", confirm=True)
def approve(
    session: ApiSession,
    request_id: Annotated[str, Argument(help="The request that `fedvit privacy reset-budget` printed.")],
) -> object:
    """Put another administrator's reset of the budget in force. Needs a token of scope admin."""
    privacy = session.client.privacy
    return session.change(
        lambda: privacy.approve_reset(request_id),
        present=privacy.budget,
        question=f"Put the reset {request_id} in force?",
    )


@local_command(app, "unfreeze")
def unfreeze(
    options: Options,
    justification: Annotated[str, Option("--justification", help="Who decided it, and how it is known.")],
) -> None:
    """Lift the freeze of a restored ledger: you confirm that nothing was charged since the backup.

    It does not lift an incident's freeze.
    """
    from fedvit.api.justification import checked_justification
    from fedvit.errors import ConflictError, UsageError

    try:
        reason = checked_justification(justification)
    except ValueError as error:
        raise UsageError("That is no justification.", cure=f"With --justification {error}.") from None
    with open_existing_store(options.settings()) as store:
        lifted = store.ledger.unfreeze_copy()
        if lifted is None:
            raise ConflictError(
                "No backup's freeze is on this ledger.", cure="An incident's is lifted by its stand-down."
            )
        audit_local(store, "CLI privacy unfreeze", {"justification": reason, "frozen_at": lifted.at.isoformat()})
        freeze = store.ledger.current_freeze()
    text = "Lifted." if freeze is None else f"Lifted; incident {freeze.incident_id} still freezes it."
    show_text(text, {"lifted": asdict(lifted), "still_frozen": asdict(freeze) if freeze else None}, options.as_json)


@local_command(app, "selection-cost", options=("config", "assignments", "as_json"))
def selection_cost(
    options: Options,
    trials: Annotated[float, Option("--trials", min=1, help="Average number of trials of a sweep.")],
    shape: Annotated[
        float, Option("--shape", min=0, help="Of the number of trials: 0 logarithmic, 1 geometric.")
    ] = 1.0,
) -> None:
    """Privacy cost of a sweep over private data that publishes its best trial only, beside the cost of one trial.

    A trial is a whole run with these settings. The guarantee needs a secret, random number of trials.
    """
    from fedvit.privacy.round_cost import run_spend
    from fedvit.privacy.selection import selection_cost as cost_of

    settings = options.settings()
    delta = settings.privacy.target_delta
    show(asdict(cost_of(run_spend(settings), mean_trials=trials, delta=delta, shape=shape)), options.as_json)


@local_command(app, "noise", options=("config", "assignments", "as_json"))
def noise(
    options: Options,
    clients: Annotated[int, Option("--clients", min=2, max=10_000, help="Clients of a cohort.")] = 30,
    images: Annotated[int, Option("--images", min=1, help="Training images of these clients together.")] = 3_000,
    numbers: Annotated[int, Option("--parameters", min=1, max=2**28, help="Trained parameters.")] = 100_000,
) -> None:
    """Where noise is added with these settings, whom that trusts, and how large the noise on a sum is.

    With privacy.noise_at distributed also the least honest survivors, neighbours, threshold and ring width.
    """
    from fedvit.secagg.outlook import noise_outlook

    settings = options.settings()
    show(noise_outlook(settings, clients=clients, images=images, numbers=numbers), options.as_json)


@local_command(app, "audit", options=("config", "assignments", "as_json"))
def audit(
    options: Options,
    quick: Annotated[bool, Option("--quick", help="Fewer models and modes: seconds instead of minutes.")] = False,
    only: Annotated[
        list[str] | None, Option("--only", help="One check by its name (repeatable); see the first column.")
    ] = None,
    fail_fast: Annotated[bool, Option("--fail-fast", help="End at the first check that fails.")] = False,
) -> None:
    """Audit the privacy of the configured model and mechanism; status 1 when a check fails.

    Neighbouring data sets, released values, a run with planted canaries, noise, samples, keys, charges.
    Trains models of its own in temporary folders, and touches neither data nor state.
    """
    import torch

    from fedvit.tools.audit.findings import Scope
    from fedvit.tools.audit.suite import audit as run_checks

    # Threads only slow small models down.
    torch.set_num_threads(1)
    scope = Scope.of(options.settings(), quick=quick)
    results: list[Timed] = []
    for timed in run_checks(scope, only or ()):
        results.append(timed)
        if fail_fast and not timed.finding.passed:
            break
    passed = all(timed.finding.passed for timed in results)
    if options.as_json:
        print_json({"passed": passed, "findings": [asdict(t.finding) | {"seconds": t.seconds} for t in results]})
    else:
        show_table(("check", "", "claimed", "at least", "seen"), map(_audit_row, results))
    if not passed:
        raise typer.Exit(1)


def _audit_row(timed: Timed) -> tuple[str, ...]:
    finding = timed.finding
    verdict = "[green]pass[/]" if finding.passed else "[bold red]FAIL[/]"
    claimed, bound = ("" if e is None else f"{e:.3f}" for e in (finding.claimed_epsilon, finding.lower_bound))
    return escape(f"{finding.check}: {finding.subject}"), verdict, claimed, bound, escape(finding.detail)
