"""kill -9 during a long operation: it comes to a definite end, and its request may be repeated under its key."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import Fedvit
from load import await_true

from fedvit.incidents.drills.processes import TITLES, kill, supervisor
from fedvit.store.store import Store
from fedvit.types import Operation, OperationStatus

FULL = os.environ.get("CHAOS") == "full"
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "optimize": ("/api/edge/optimize", {"strategy": "quantization", "target_latency": 1000}),
    "retrain": ("/api/model/retrain", {"strategy": "full_retrain"}),
    "restart": ("/api/training/restart", {"client_selection": "any"}),
    "shutdown": ("/api/system/shutdown", {"mode": "graceful", "save_state": True}),
}
TRAINING = ("optimize", "retrain", "restart")
CASES = [(kind, part) for kind in TRAINING for part in TITLES] if FULL else [("retrain", "control")]
RESTARTED_S = 180.0

pytestmark = [pytest.mark.ray, *([pytest.mark.timeout(3600)] if FULL else [])]


class Caller:
    """Asks for an operation under a key, and asks again whatever came of it."""

    def __init__(self, fedvit: Fedvit, kind: str, key: str) -> None:
        self._url = fedvit.control + REQUESTS[kind][0]
        self._request = {"json": REQUESTS[kind][1], "headers": {"Idempotency-Key": key}}

    def ask(self) -> httpx.Response | None:
        try:
            return httpx.post(self._url, **self._request, timeout=90)  # type: ignore[arg-type]
        except httpx.HTTPError:
            return None

    def insist(self) -> str:
        """The operation, once somebody says which."""
        answers: list[httpx.Response] = []

        def accepted() -> bool:
            answer = self.ask()
            answers.extend([answer] if answer is not None and answer.status_code == 202 else [])
            return bool(answers)

        await_true(accepted, "an answer under the old key", limit_s=RESTARTED_S)
        return str(answers[-1].json()["operation_id"])


def one_more(store: Store, before: int) -> Operation:
    """The operation that was queued since; there is one at most, ever."""
    operations = store.operations.all()
    assert len(operations) == before + 1
    return operations[0]


def interrupted(fedvit: Fedvit, store: Store, kind: str, part: str) -> Operation:
    """One operation whose ``part`` is killed as soon as it is on record, asked for again until somebody answers."""
    before = len(store.operations.all())
    caller = Caller(fedvit, kind, key=f"{kind}-{part}")
    first = threading.Thread(target=caller.ask)
    first.start()
    await_true(lambda: len(store.operations.all()) > before, f"{kind} on record", every_s=0.005)
    kill(fedvit.home, part)
    first.join()
    named = caller.insist()
    await_true(lambda: one_more(store, before).status.ended, f"the end of {kind}", limit_s=RESTARTED_S)
    assert caller.insist() == named == one_more(store, before).operation_id
    return one_more(store, before)


def test_an_operation_survives_the_death_of_who_runs_it(running: Fedvit) -> None:
    fedvit = running
    with Store.open(fedvit.home) as store:
        for kind, part in CASES:
            await_true(lambda: _rests(fedvit), "the end of training", limit_s=RESTARTED_S)
            runs, releases = len(store.runs.all()), len(store.releases.all())
            ended = interrupted(fedvit, store, kind, part)
            # All three kinds are repeated from their beginning by the next process.
            assert ended.status is OperationStatus.SUCCEEDED, (kind, part, ended.error)
            if kind == "optimize":
                assert len(store.runs.all()) == runs
                assert len(store.releases.all()) <= releases + 1
            else:
                assert len(store.runs.all()) == runs + 1
                assert store.runs.all()[-1].run_id == (ended.result or {})["run_id"]
            print(f"{kind}, {part} killed: {ended.status}")
        store.ledger.verify()
        store.audit.verify()


@pytest.mark.campaign
@pytest.mark.parametrize("part", TITLES)
def test_a_shutdown_survives_too_and_ends_the_system_once(fedvit: Fedvit, part: str) -> None:
    fedvit.json("up")
    caller, first = Caller(fedvit, "shutdown", key=f"shutdown-{part}"), supervisor(fedvit.home)
    asking = threading.Thread(target=caller.ask)
    asking.start()
    with Store.open(fedvit.home) as store:
        await_true(lambda: bool(store.operations.all()), "the shutdown on record", every_s=0.005)
        kill(fedvit.home, part)
        asking.join()
        await_true(lambda: one_more(store, 0).status.ended, "the end of the operation", limit_s=RESTARTED_S)
        if one_more(store, 0).status is OperationStatus.FAILED:
            # Its aggregator died in it: under the same key that is what is said, for ever; asked anew, it is done.
            assert (one_more(store, 0).error or {})["code"] == "interrupted"
            assert caller.insist() == one_more(store, 0).operation_id
            Caller(fedvit, "shutdown", key=f"shutdown-{part}-again").ask()
        await_true(lambda: not Path(f"/proc/{first}").exists(), "the end of the system", limit_s=RESTARTED_S)
        asked = len(store.operations.all())
        fedvit.json("up")
        second = supervisor(fedvit.home)
        assert caller.insist() == store.operations.all()[-1].operation_id
        assert len(store.operations.all()) == asked
        # The repetition ended nothing.
        await_true(lambda: _rests(fedvit), "the end of training", limit_s=RESTARTED_S)
        assert supervisor(fedvit.home) == second != first
        assert httpx.get(f"{fedvit.control}/healthz", timeout=60).status_code == 200


def _rests(fedvit: Fedvit) -> bool:
    try:
        result = httpx.get(f"{fedvit.control}/api/training/status", timeout=60).json()
    except (httpx.HTTPError, ValueError):
        return False
    return result.get("status") == "completed" and result["phase"] == "resting"
