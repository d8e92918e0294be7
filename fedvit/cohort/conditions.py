"""Conditions of a client and of training, as in Kubernetes: a type, a status, a reason and a message each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fedvit.cohort.connectivity import Connection
from fedvit.store.records import ClientValidation
from fedvit.types import BudgetReport, Client, RunStatus, TrainingProgress

Status = Literal["True", "False", "Unknown"]


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition. ``last_transition_at`` is None where the time of the change was not recorded."""

    type: str
    status: Status
    reason: str
    message: str
    last_transition_at: datetime | None = None


def client_conditions(
    client: Client, connection: Connection, validation: ClientValidation | None
) -> tuple[Condition, ...]:
    """Connected, Admitted, Validated, Active and Quarantined; ``validation`` is None where no decision was made."""
    connected = _status(connection.connected)
    return (
        Condition("Connected", connected, connection.reason, connection.message, connection.since),
        _admitted(client),
        _validated(client, validation),
        _active(client),
        _quarantined(client),
    )


def progress_conditions(
    progress: TrainingProgress, budget: BudgetReport | None, frozen: str | None, release: tuple[str, datetime] | None
) -> tuple[Condition, ...]:
    """Running, BudgetAvailable and Released.

    Args:
        budget: None where the accountant does not answer.
        frozen: the incident that froze the ledger, if one did.
        release: the version that is offered now, and since when.
    """
    return (_running(progress), _budget(budget, frozen), _released(release))


def _admitted(client: Client) -> Condition:
    if client.admitted:
        most = f"It may count with {client.admitted_examples} examples."
        return Condition("Admitted", "True", "Admitted", most)
    if client.admitted_examples is None:
        return Condition("Admitted", "False", "AwaitsOperator", "It takes part once an operator validates it.")
    claim = f"It registered {client.num_examples} examples, and was admitted with {client.admitted_examples}."
    return Condition("Admitted", "False", "TooManyExamples", claim)


def _validated(client: Client, validation: ClientValidation | None) -> Condition:
    if validation is None:
        return Condition("Validated", _status(client.validated), "ByDefault", "No decision was made about it.")
    if validation.automatic:
        reason, message = "ByQuality", validation.reason or "It follows from what was seen of its data."
    else:
        reason, message = "ByOperator", validation.reason or "An operator decided so, without a word."
    return Condition("Validated", _status(client.validated), reason, message, validation.at)


def _active(client: Client) -> Condition:
    if client.active:
        return Condition("Active", "True", "Registered", "It is on the list of active clients.")
    return Condition("Active", "False", "Removed", "It was removed from the list of active clients.")


def _quarantined(client: Client) -> Condition:
    if client.quarantined:
        message = client.quarantine_reason or "An incident put it there."
        return Condition("Quarantined", "True", "Incident", message, client.quarantined_at)
    return Condition("Quarantined", "False", "NoIncident", "No incident keeps it out of rounds.")


def _running(progress: TrainingProgress) -> Condition:
    if progress.run_id is None:
        return Condition("Running", "False", "NoRun", "No run was started yet.")
    status = progress.status or RunStatus.STOPPED
    reason = "".join(word.capitalize() for word in status.split("_"))
    message = progress.message or f"{progress.run_id} is {status.replace('_', ' ')}, phase {progress.phase}."
    return Condition("Running", _status(status is RunStatus.RUNNING), reason, message)


def _budget(budget: BudgetReport | None, frozen: str | None) -> Condition:
    if frozen is not None:
        return Condition("BudgetAvailable", "False", "LedgerFrozen", f"Incident {frozen} froze the privacy ledger.")
    if budget is None:
        return Condition("BudgetAvailable", "Unknown", "AccountantSilent", "The privacy accountant does not answer.")
    left = f"Epsilon {budget.epsilon_remaining:.4f} of {budget.target_epsilon:g} is left."
    available = budget.epsilon_remaining > 0
    return Condition("BudgetAvailable", _status(available), "EpsilonLeft" if available else "Exhausted", left)


def _released(release: tuple[str, datetime] | None) -> Condition:
    if release is None:
        return Condition("Released", "False", "NoRelease", "No model version is released yet.")
    return Condition("Released", "True", "Offered", f"{release[0]} is offered to replicas and vehicles.", release[1])


def _status(holds: bool | None) -> Status:
    return "Unknown" if holds is None else "True" if holds else "False"
