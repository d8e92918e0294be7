"""Heartbeats: who may beat for whom, what they cost the store, and when they get there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
from fastapi.testclient import TestClient
from httpx import Response
from sqlalchemy import Engine, event

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.config import FleetConfig
from fedvit.errors import ConfigError, StateError
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import ManualClock
from fedvit.types import Client, ClientKind, utc_now
from serve_apps.control.api import Services, create_api
from serve_apps.control.fleet.heartbeats import Heartbeats
from serve_apps.control.http.write_behind import WriteBehind

WAIT_S = 20.0


class Garage:
    """A control API over a real store with three trucks; no actor is needed to hear them."""

    def __init__(self, home: Path) -> None:
        self.store = Store.open(home)
        self.store.clients.register([Client(f"truck-{i}", ClientKind.REMOTE, 10) for i in range(3)])
        settings = load_settings(environ={}, overrides={"home": home})

        def nobody() -> NoReturn:
            raise AssertionError("an actor was asked")

        self.api = create_api(Services(settings, self.store, nobody, nobody))
        self.http = TestClient(self.api, raise_server_exceptions=False)

    def token(self, scope: str, client_id: str | None = None) -> str:
        return create_token(self.store, "x", [scope], now=utc_now(), client_id=client_id).text

    def beat(self, client_id: str, token: str | None = None, body: dict[str, Any] | None = None) -> Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return self.http.post(f"/api/clients/{client_id}/heartbeat", json=body or {}, headers=headers)


@pytest.fixture
def garage(tmp_path: Path) -> Iterator[Garage]:
    result = Garage(tmp_path)
    yield result
    result.store.close()


@pytest.fixture
def writes(garage: Garage) -> Iterator[list[str]]:
    """The statements that write to the store from now on."""
    begun: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip().split(" ", 1)[0].upper() in ("INSERT", "UPDATE", "DELETE"):
            begun.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield begun
    event.remove(Engine, "before_cursor_execute", note)


def test_a_vehicle_is_told_when_to_beat_again(garage: Garage) -> None:
    answer = garage.beat("truck-1", body={"status": "degraded", "model_version": "v1.1.2"})
    assert answer.status_code == 200
    result = answer.json()
    assert (result["client_id"], result["interval_s"], result["backup_channel"]) == ("truck-1", 60.0, False)
    assert abs(datetime.fromisoformat(result["received_at"]) - utc_now()) < timedelta(minutes=1)


def test_beats_cost_no_write_and_no_line_in_the_trail(garage: Garage, writes: list[str]) -> None:
    token = garage.token("device", "truck-1")
    writes.clear()
    for _ in range(5):
        assert garage.beat("truck-1", token).status_code == 200
        assert garage.beat("truck-2").status_code == 200
    assert garage.beat("truck-2", token).status_code == 403
    assert writes == []
    assert garage.store.audit.entries() == []


def test_an_application_that_ends_has_written_everything_in_two_transactions(garage: Garage, writes: list[str]) -> None:
    token = garage.token("device", "truck-1")
    writes.clear()
    with garage.http:
        results = [garage.beat(name, token).json() for name in ["truck-1"] * 20]
        garage.beat("truck-2")
    assert garage.store.clients.get("truck-1").last_seen_at == datetime.fromisoformat(results[-1]["received_at"])
    assert garage.store.clients.get("truck-2").last_seen_at is not None
    assert garage.store.clients.get("truck-0").last_seen_at is None
    assert garage.store.tokens.all()[0].last_used_at is not None
    assert 0 < len(writes) < 10


def test_the_thread_writes_while_the_application_runs(garage: Garage) -> None:
    with garage.http:
        garage.beat("truck-1")
        deadline_s = time.monotonic() + WAIT_S
        while garage.store.clients.get("truck-1").last_seen_at is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_an_unknown_vehicle_is_not_found_and_not_remembered(garage: Garage) -> None:
    for client_id in ("nobody", "..", "x" * 300, "truck-1 "):
        assert garage.beat(client_id).status_code in (404, 405), client_id
    garage.store.clients.register([Client("nobody", ClientKind.REMOTE, 1)])
    assert garage.beat("nobody").status_code == 200


def test_a_bound_token_speaks_for_its_client_only(garage: Garage) -> None:
    bound = garage.token("device", "truck-1")
    assert garage.beat("truck-1", bound).status_code == 200
    refused = garage.beat("truck-2", bound)
    assert (refused.status_code, refused.json()["type"]) == (403, "/problems/forbidden")
    assert garage.beat("nobody", bound).status_code == 403
    register = garage.http.post(
        "/api/clients/register", json={"device_id": "truck-2"}, headers={"Authorization": f"Bearer {bound}"}
    )
    assert register.status_code == 403
    for scope, client_id in (("device", "truck-2"), ("operator", None)):
        assert garage.beat("truck-2", garage.token(scope, client_id)).status_code == 200
    for scope in ("viewer", "releases"):
        assert garage.beat("truck-2", garage.token(scope)).status_code == 403


def test_only_a_device_is_bound_and_only_to_what_can_be_a_client(garage: Garage) -> None:
    for scope, client_id in (("operator", "truck-1"), ("device", "../x"), ("device", "a\n"), ("device", "")):
        with pytest.raises(ConfigError):
            garage.token(scope, client_id)
    assert garage.store.tokens.all() == []


def test_a_beat_that_says_something_else_is_refused(garage: Garage) -> None:
    bodies: list[dict[str, Any]] = [{"status": "fine"}, {"model_version": "x" * 65}, {"speed": 3}, {"status": None}]
    for body in bodies:
        assert garage.beat("truck-1", body=body).status_code == 422, body


def test_what_could_not_be_written_is_kept_and_newer_moments_win(caplog: pytest.LogCaptureFixture) -> None:
    begin = utc_now()
    faults: list[Exception] = [StateError("The disk is full.")]
    written: dict[str, datetime] = {}

    def write(seen: Mapping[str, datetime]) -> None:
        if faults:
            # As if another beat came in while the store was asked.
            buffer.put("a", begin + timedelta(seconds=9))
            raise faults.pop()
        written.update(seen)

    buffer = WriteBehind(write)
    buffer.put("a", begin)
    buffer.put("b", begin)
    buffer.flush()
    assert "2 moments could not be written" in caplog.text
    buffer.flush()
    assert written == {"a": begin + timedelta(seconds=9), "b": begin}
    written.clear()
    buffer.flush()
    assert written == {}


def test_the_store_moves_only_forward(garage: Garage) -> None:
    now = utc_now()
    garage.store.clients.set_last_seen({"truck-1": now, "nobody": now})
    garage.store.clients.set_last_seen({"truck-1": now - timedelta(seconds=5), "truck-2": now})
    assert garage.store.clients.get("truck-1").last_seen_at == now
    assert garage.store.clients.get("truck-2").last_seen_at == now
    assert garage.store.clients.count() == 3


def test_a_replica_combines_what_it_heard_with_what_the_store_knows(garage: Garage) -> None:
    clock = ManualClock()
    heartbeats = Heartbeats(garage.store, FleetConfig(), clock)
    early, late = clock.now() - timedelta(days=1), clock.now() + timedelta(days=1)
    assert heartbeats.last_seen("truck-1", None) is None
    assert heartbeats.last_seen("truck-1", early) == early
    heartbeats.learn("truck-1")
    at = heartbeats.beat("truck-1")
    assert heartbeats.last_seen("truck-1", None) == at
    assert heartbeats.last_seen("truck-1", early) == at
    assert heartbeats.last_seen("truck-1", late) == late


def test_an_arrival_is_a_vehicle_that_was_not_connected(garage: Garage) -> None:
    clock = ManualClock()
    garage.store.clients.set_last_seen({"truck-2": clock.now() - timedelta(seconds=149)})
    heartbeats = Heartbeats(garage.store, FleetConfig(), clock)
    for name in ("truck-1", "truck-2"):
        heartbeats.learn(name)
        heartbeats.beat(name)
    assert heartbeats.arrivals == 1
    clock.advance(150)
    heartbeats.beat("truck-1")
    assert heartbeats.arrivals == 1
    clock.advance(151)
    heartbeats.beat("truck-1")
    assert heartbeats.arrivals == 2


def test_the_document_says_that_telemetry_and_uploads_are_not_audited(garage: Garage) -> None:
    paths = garage.api.openapi()["paths"]
    unaudited = [path for path, verbs in paths.items() for facts in verbs.values() if facts.get("x-audited") is False]
    upload = "/api/clients/{client_id}/updates/{run_id}/{round_index}"
    histograms = "/api/clients/{client_id}/histograms/{run_id}/{round_index}"
    phases = "/api/clients/{client_id}/sessions/{session}/{phase}"
    heartbeat, alerts = "/api/clients/{client_id}/heartbeat", "/api/incidents/alerts"
    assert set(unaudited) == {heartbeat, upload, histograms, phases, alerts}
    assert paths["/api/clients/{client_id}/heartbeat"]["post"]["x-scope"] == [Scope.DEVICE, Scope.OPERATOR]
