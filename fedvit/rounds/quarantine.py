"""Quarantine of clients whose updates fail validation repeatedly."""

from __future__ import annotations

from collections.abc import Iterable

from fedvit.ports import ClockPort
from fedvit.store.store import Store
from fedvit.types import ClientOutcome

_KEY = "refused_updates/"


def count_invalid_updates(
    store: Store,
    run_id: str,
    round_index: int,
    outcomes: Iterable[ClientOutcome],
    quarantine_after_rejections: int | None,
    clock: ClockPort,
) -> list[str]:
    """Count the updates that are held against each client, once a round however often it is tried.

    The count begins anew with the quarantine, so that a client that is reinstated has as many attempts again.

    Returns:
        The clients that are now in quarantine.
    """
    quarantined = []
    for outcome in outcomes:
        if not outcome.counted_against_client:
            continue
        count = _counted(store, run_id, round_index, outcome.client_id)
        if quarantine_after_rejections is not None and count >= quarantine_after_rejections:
            last = f"the last in round {round_index} of {run_id}: {outcome.error}"
            reason = f"{count} of its updates were refused; {last}"
            quarantined += store.clients.quarantine([outcome.client_id], reason, clock.now())
            store.metadata.set(_KEY + outcome.client_id, {"count": 0, "last": [run_id, round_index]})
    return quarantined


def _counted(store: Store, run_id: str, round_index: int, client_id: str) -> int:
    with store.transaction() as transaction:
        counted = transaction.metadata.get(_KEY + client_id) or {"count": 0, "last": None}
        count = int(counted["count"])
        if counted["last"] != [run_id, round_index]:
            count += 1
            transaction.metadata.set(_KEY + client_id, {"count": count, "last": [run_id, round_index]})
        return count
