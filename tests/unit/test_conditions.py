"""What holds of training, as conditions; and who is connected, judged from facts alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from fedvit.cohort.conditions import progress_conditions
from fedvit.cohort.connectivity import connection_of, connectivity
from fedvit.ports import ProxyReport
from fedvit.types import BudgetReport, ClientKind, LastContact, RunStatus, TrainingProgress, utc_now

NOW = utc_now()
PROGRESS = TrainingProgress("run-0001", RunStatus.RUNNING, "training", 4, 1, None, None, 0.5, None)
BUDGET = BudgetReport("record", 8.0, 1e-5, 0.5, 0.6, 0.5, 1, 3)


def held(**changes: object) -> dict[str, tuple[str, str]]:
    progress = replace(PROGRESS, **{k: v for k, v in changes.items() if k in ("status", "message")})  # type: ignore[arg-type]
    budget = changes.get("budget", BUDGET)
    result = progress_conditions(progress, budget, changes.get("frozen"), changes.get("release"))  # type: ignore[arg-type]
    return {c.type: (c.status, c.reason) for c in result}


def test_a_run_under_way_with_budget_and_release() -> None:
    assert held(release=("v1.1.1", NOW)) == {
        "Running": ("True", "Running"),
        "BudgetAvailable": ("True", "EpsilonLeft"),
        "Released": ("True", "Offered"),
    }


@pytest.mark.parametrize(
    ("status", "reason"), [(RunStatus.STOPPED, "Stopped"), (RunStatus.BUDGET_EXHAUSTED, "BudgetExhausted")]
)
def test_a_run_that_rests_says_why(status: RunStatus, reason: str) -> None:
    assert held(status=status)["Running"] == ("False", reason)


def test_a_budget_is_not_available_when_it_is_spent_or_frozen() -> None:
    assert held(budget=replace(BUDGET, epsilon_spent=8.0))["BudgetAvailable"] == ("False", "Exhausted")
    assert held(frozen="PB-1")["BudgetAvailable"] == ("False", "LedgerFrozen")
    assert held(budget=None)["BudgetAvailable"] == ("Unknown", "AccountantSilent")


def test_a_vehicle_is_connected_for_as_long_as_it_is_heard() -> None:
    truck = LastContact("truck", ClientKind.REMOTE, NOW)
    assert connection_of(truck, None, NOW + timedelta(seconds=90), 90).connected is True
    gone = connection_of(truck, None, NOW + timedelta(seconds=91), 90)
    assert (gone.connected, gone.since) == (False, NOW + timedelta(seconds=90))
    # A proxy says nothing of a vehicle, nor a heartbeat of a virtual client.
    virtual = LastContact("v", ClientKind.VIRTUAL, None)
    assert connection_of(virtual, ProxyReport({"p": True}), NOW, 90).connected is True
    assert connection_of(replace(virtual, last_seen_at=NOW), ProxyReport({"p": False}), NOW, 90).connected is False


def test_a_partition_is_suspected_below_half() -> None:
    def fleet(there: int, gone: int) -> bool:
        last_contacts = [LastContact(f"a{i}", ClientKind.SILO, NOW) for i in range(there)]
        last_contacts += [LastContact(f"b{i}", ClientKind.REMOTE, None) for i in range(gone)]
        return connectivity(last_contacts, None, NOW, 90).partition_suspected

    assert (fleet(0, 0), fleet(1, 1), fleet(49, 51), fleet(51, 49)) == (False, False, True, False)
