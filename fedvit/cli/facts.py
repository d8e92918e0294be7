"""Where a system stands, from itself when it runs and from its store when it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedvit.cli.common import running_system
from fedvit.cli.control import control_client
from fedvit.errors import FedvitError

if TYPE_CHECKING:
    from fedvit.config import Settings


def facts_of(settings: Settings) -> dict[str, Any]:
    """Status, rounds, release and epsilon; JSON types only."""
    running = running_system(settings.home)
    if running is None:
        return {"system": "down", **_stored_facts(settings)}
    try:
        with control_client(running.urls.control, settings) as client:
            health, budget = client.system.health(), client.privacy.budget()
    except FedvitError as error:
        return {"system": f"not answering ({error})", "pid": running.pid, **_stored_facts(settings)}
    training = health.training
    return {
        "system": health.status,
        "pid": running.pid,
        "control": running.urls.control,
        "parts": dict(health.parts),
        "training": (training and training.status) or "not started",
        "rounds": f"{training.rounds_done} of {training.rounds_total}" if training else "0 of 0",
        "accuracy": training.accuracy if training else None,
        "release": health.release,
        "epsilon_spent": budget.epsilon_spent,
        "epsilon_remaining": budget.epsilon_remaining,
    }


def _stored_facts(settings: Settings) -> dict[str, Any]:
    if not (settings.home / "state.db").exists():
        return {"state": f"none at {settings.home}"}
    from fedvit.privacy.accountant import PrivacyAccountant
    from fedvit.store.store import Store

    store = Store.open(settings.home)
    run, release = store.latest_run(), store.current_release()
    budget = PrivacyAccountant(store, settings).budget()
    return {
        "training": run.status.value if run else "not started",
        "rounds": f"{run.rounds_done} of {run.rounds_total}" if run else "0",
        "release": release.version if release else None,
        "epsilon_spent": budget.epsilon_spent,
        "epsilon_remaining": budget.epsilon_remaining,
    }
