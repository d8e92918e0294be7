"""The aggregation mode switched there and back while a real fleet trains: nothing is lost, doubled or uncharged."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import Fedvit

from fedvit.store.store import Store
from fedvit.types import RunStatus

pytestmark = [pytest.mark.ray, pytest.mark.campaign]

ROUNDS = 24
START_TIMEOUT_S = 180.0


def await_progress(http: httpx.Client, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask until training has come so far."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        progress: dict[str, Any] = http.get("/api/training/status").json()
        if reached(progress):
            return progress
        time.sleep(0.1)
    raise AssertionError(f"training did not come so far: {progress}")


def switch(http: httpx.Client, **body: Any) -> None:
    """Change the mode and see it in a second request."""
    assert http.post("/api/aggregation/mode", json=body).status_code == 200
    assert http.get("/api/aggregation/mode").json()["mode"] == body["mode"]


def test_the_mode_is_switched_there_and_back_in_a_live_run(fedvit: Fedvit) -> None:
    fedvit.settings |= {"training.rounds": str(ROUNDS), "ray.proxies": "2", "release.every_rounds": str(ROUNDS)}
    fedvit.json("up")
    with httpx.Client(base_url=fedvit.control, timeout=30) as http:
        http.post("/api/training/start")
        await_progress(http, lambda told: told["rounds_done"] >= 2)
        switch(http, mode="asynchronous", staleness_tolerance=5)
        turned = await_progress(http, lambda told: told["rounds_done"] >= 3)["rounds_done"]
        await_progress(http, lambda told: told["rounds_done"] >= turned + 6)
        switch(http, mode="synchronous")
        ended = await_progress(http, lambda told: told["status"] != "running")
        assert (ended["status"], ended["rounds_done"]) == ("completed", ROUNDS)
    check_nothing_lost(fedvit)


def check_nothing_lost(fedvit: Fedvit) -> None:
    """Charges, outcomes, what versions say of themselves, and their numbers."""
    with Store.open(fedvit.home) as store:
        run = store.latest_run()
        assert run is not None
        assert (run.ordinal, run.status, run.rounds_done) == (1, RunStatus.COMPLETED, ROUNDS)
        assert [v.version for v in store.versions()] == [f"v1.1.{n}" for n in range(ROUNDS, 0, -1)]
        lineages = [dict(v.lineage) for v in store.versions()]
        told = [lineage["aggregation"] for lineage in lineages if "aggregation" in lineage]
        assert "asynchronous" in {each["mode"] for each in told}
        assert any(staleness > 0 for each in told for staleness in each["staleness"].values())
        assert "aggregation" not in lineages[0]
        folded = sum(len(lineage["clients"]) for lineage in lineages)
        refused = sum(len(each["refused"]) for each in told)
        charged = store.verify_ledger()
    with sqlite3.connect(fedvit.home / "state.db") as database:
        (answered,) = database.execute("SELECT count(*) FROM client_rounds").fetchone()
    assert charged == answered == folded + refused
