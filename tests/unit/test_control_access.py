"""The control API towards strangers, clumsy callers and hostile ones."""

from __future__ import annotations

import json
import logging
import pickle
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from httpx import Response
from prometheus_client import REGISTRY
from pydantic import BaseModel, ConfigDict

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.config import Settings
from fedvit.errors import ConflictError, NotFoundError, StateError
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import seeded_fleet
from fedvit.types import Operation, TrainingProgress, Variant, utc_now
from serve_apps.control.api import Services, create_api
from serve_apps.control.http.access import CurrentIdentity, Guard, Note, public, requires
from serve_apps.logs import log_to_file

RESTING = TrainingProgress(None, None, "resting", 0, 0, None, None, 0.0, None)
BODY = {"device_id": "truck-7", "num_examples": 12, "capabilities": {"camera": "front"}}
PROBLEM = "application/problem+json"


class IdleAggregator:
    """A training loop that only counts."""

    def __init__(self) -> None:
        self.starts = 0

    def start_training(self) -> TrainingProgress:
        self.starts += 1
        return RESTING

    def stop_training(self) -> TrainingProgress:
        return RESTING

    def progress(self) -> TrainingProgress:
        return RESTING

    def wait(self, timeout_s: float) -> TrainingProgress:
        return RESTING

    def submit(self, kind: str, params: Mapping[str, Any], call_key: str | None = None) -> Operation:
        raise ConflictError("The loop is idle.")

    def cancel_operation(self, operation_id: str) -> Operation:
        raise NotFoundError("There is no operation.")

    def rollback(self, version: str, *, force: bool = False, reason: str | None = None) -> str:
        raise NotFoundError("There is no version.")

    def switch_variant(self, variant: Variant) -> str:
        raise ConflictError("There is no release.")


class Anything(BaseModel):
    """A body with a field for any JSON."""

    model_config = ConfigDict(extra="forbid")
    value: Any


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class House:
    """A control API over a real store, with one token for each scope."""

    def __init__(self, home: Path, **access: Any) -> None:
        self.settings: Settings = load_settings(environ={}, overrides={"home": home, "access": access})
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register(seeded_fleet(2))
        self.clock, self.aggregator = Clock(), IdleAggregator()
        accountant = PrivacyAccountant(self.store, self.settings)
        services = Services(self.settings, self.store, lambda: self.aggregator, lambda: accountant)
        self.api: FastAPI = create_api(services, Guard(self.settings, self.store, monotonic=self.clock))
        self.client = TestClient(self.api, raise_server_exceptions=False)
        self.tokens = {scope: create_token(self.store, scope, [scope], now=utc_now()).text for scope in Scope}

    def ask(self, method: str, path: str, scope: str | None = None, **more: Any) -> Response:
        headers = dict(more.pop("headers", {}))
        if scope is not None:
            headers["Authorization"] = f"Bearer {self.tokens[Scope(scope)]}"
        return self.client.request(method, path, headers=headers, **more)

    def refused(self, reason: str) -> float:
        name = "fed_vit_autorl_unauthorized_requests_total"
        return REGISTRY.get_sample_value(name, {"reason": reason}) or 0.0


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path, mode="tokens")
    yield house
    house.store.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.store.close()


def operations(api: FastAPI) -> list[tuple[str, str, dict[str, Any]]]:
    found = [
        (verb.upper(), path, facts) for path, verbs in api.openapi()["paths"].items() for verb, facts in verbs.items()
    ]
    assert len(found) > 10
    return found


def takes_json(facts: dict[str, Any]) -> bool:
    return "application/json" in facts.get("requestBody", {}).get("content", {})


IMPLIED = {
    "viewer": {"viewer"},
    "operator": {"viewer", "operator"},
    "admin": {"viewer", "operator", "admin"},
    "emergency": {"viewer", "emergency"},
    "device": {"device"},
    "alerts": {"alerts"},
}
# What is sent there has a format of somebody else's, who may extend it.
FOREIGN_BODIES = {"AlertmanagerMessage"}


# --- who may do what -------------------------------------------------------------------------------------------------


def test_every_route_says_who_may_use_it_and_how_it_refuses(guarded: House) -> None:
    for method, path, facts in operations(guarded.api):
        scopes = facts["x-scope"]
        assert set(scopes) <= set(Scope)
        assert scopes or path == "/healthz"
        assert facts.get("security", []) == ([{"token": []}] if scopes else [])
        for status in ("401", "403", "429"):
            assert PROBLEM in facts["responses"][status]["content"], (method, path)
        if method != "GET":
            assert set(scopes) & {"operator", "admin", "emergency", "device"}, (method, path)


def test_every_body_refuses_unknown_fields(guarded: House) -> None:
    schemas = guarded.api.openapi()["components"]["schemas"]
    bodies = [facts["requestBody"] for _, _, facts in operations(guarded.api) if takes_json(facts)]
    assert bodies
    for body in bodies:
        name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
        assert (name in FOREIGN_BODIES) == (schemas[name].get("additionalProperties") is not False)


def test_every_body_is_explained_by_an_example_that_is_admitted(guarded: House) -> None:
    for method, path, facts in operations(guarded.api):
        if not takes_json(facts):
            continue
        url = path.replace("{round_index}", "1").replace("{", "").replace("}", "")
        scope = facts["x-scope"][0]
        refused = guarded.ask(method, url, scope, content=b"{...}")
        assert refused.status_code == 400, (method, path)
        assert guarded.ask(method, url, scope, json=refused.json()["example"]).status_code not in (400, 422), path


@pytest.mark.parametrize("held", list(Scope))
def test_each_scope_opens_its_routes_and_no_other(guarded: House, held: Scope) -> None:
    for method, path, facts in operations(guarded.api):
        answer = guarded.ask(method, path.replace("{", "").replace("}", ""), held)
        allowed = not facts["x-scope"] or bool(IMPLIED[held] & set(facts["x-scope"]))
        assert (answer.status_code == 403) != allowed, (method, path, answer.text)
        assert answer.status_code != 401
        if not allowed:
            assert answer.headers["content-type"] == PROBLEM
            assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


def test_without_a_token_only_public_routes_answer(guarded: House) -> None:
    for method, path, facts in operations(guarded.api):
        answer = guarded.ask(method, path.replace("{", "").replace("}", ""))
        assert (answer.status_code == 401) == bool(facts["x-scope"]), (method, path)
        if facts["x-scope"]:
            assert answer.headers["content-type"] == PROBLEM
            assert answer.headers["www-authenticate"] == 'Bearer realm="fedvit"'
    assert guarded.aggregator.starts == 0


def test_the_matrix_leaves_no_route_out(guarded: House) -> None:
    """What the document does not show is the document itself and its two readers, which change nothing."""
    served = {
        (method, route.path) for route in guarded.api.routes if isinstance(route, APIRoute) for method in route.methods
    }
    assert served == {(method, path) for method, path, _ in operations(guarded.api)}
    others = {getattr(route, "path", None) for route in guarded.api.routes if not isinstance(route, APIRoute)}
    assert others <= {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


@pytest.mark.parametrize("kind", ["expired", "revoked", "invented"])
def test_no_token_that_is_not_good_opens_a_route(guarded: House, kind: str) -> None:
    past = utc_now() - timedelta(days=2)
    lifetime = timedelta(days=1) if kind == "expired" else None
    made = create_token(guarded.store, kind, [Scope.ADMIN, Scope.EMERGENCY, Scope.DEVICE], now=past, lifetime=lifetime)
    if kind == "revoked":
        guarded.store.tokens.revoke(made.token.token_id, utc_now())
    text = f"{made.text[:-43]}{'A' * 43}" if kind == "invented" else made.text
    # One after another they would only be told to wait.
    for method, path, facts in operations(guarded.api):
        guarded.clock.now_s += 1000
        headers = {"Authorization": f"Bearer {text}"}
        answer = guarded.ask(method, path.replace("{", "").replace("}", ""), headers=headers)
        assert (answer.status_code == 401) == bool(facts["x-scope"]), (method, path)
    assert guarded.aggregator.starts == 0
    assert guarded.store.audit.entries() == []


def test_the_matrix_knows_every_scope() -> None:
    assert set(IMPLIED) == set(Scope)


def test_a_route_that_says_nothing_cannot_be_added(house: House) -> None:
    with pytest.raises(TypeError, match="/api/secret"):
        house.api.get("/api/secret")(lambda: "x")


def test_a_requirement_on_a_route_that_nobody_guards_fails_closed() -> None:
    api = FastAPI()
    api.get("/x", dependencies=[requires(Scope.VIEWER)])(lambda: "x")
    assert TestClient(api, raise_server_exceptions=False).get("/x").status_code == 500


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("Basic YTpi", "malformed"),
        ("Bearer", "malformed"),
        ("Bearer fvt_x_y", "malformed"),
        (f"Bearer fvt_{'0' * 12}_{'A' * 43}", "invalid"),
        ("Bearer \xff\xfe", "malformed"),
        (f"Bearer {'a' * 60_000}", "malformed"),
    ],
)
def test_a_bad_token_is_refused_counted_and_not_repeated(house: House, header: str, reason: str) -> None:
    before = house.refused(reason)
    answer = house.client.get("/api/training/status", headers={"Authorization": header.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="fedvit", error="invalid_token"'
    assert "fvt_0" not in answer.text
    assert house.refused(reason) == before + 1


def test_two_tokens_in_one_request_are_none(guarded: House) -> None:
    good = f"Bearer {guarded.tokens[Scope.ADMIN]}"
    headers = [("Authorization", good), ("Authorization", good)]
    assert guarded.client.get("/api/training/status", headers=headers).status_code == 401


def test_revoked_and_expired_tokens_say_so(guarded: House) -> None:
    made = create_token(guarded.store, "old", ["admin"], now=utc_now() - timedelta(days=2), lifetime=timedelta(days=1))
    guarded.tokens[Scope.ADMIN] = made.text
    assert "expired" in guarded.ask("GET", "/api/audit", "admin").json()["detail"]
    guarded.store.tokens.revoke(made.token.token_id, utc_now())
    assert "revoked" in guarded.ask("GET", "/api/audit", "admin").json()["detail"]


def test_too_many_bad_tokens_are_put_off_and_a_good_one_still_passes(tmp_path: Path) -> None:
    house = House(tmp_path, mode="tokens", max_failed_attempts=3, failed_attempts_window_s=60)
    bad = {"Authorization": f"Bearer fvt_{'0' * 12}_{'A' * 43}"}
    assert [house.ask("GET", "/api/audit", headers=bad).status_code for _ in range(4)] == [401, 401, 401, 429]
    assert house.ask("GET", "/api/audit", headers=bad).headers["retry-after"] == "60"
    assert house.ask("GET", "/api/audit", "admin").status_code == 200
    house.clock.now_s += 61
    assert house.ask("GET", "/api/audit", headers=bad).status_code == 401
    house.store.close()


def test_what_is_grave_demands_a_token_on_loopback_too(house: House) -> None:
    @house.api.post("/api/grave", dependencies=[requires(Scope.EMERGENCY, token_always=True)])
    def grave(who: CurrentIdentity) -> str:
        return who.actor

    assert house.ask("POST", "/api/training/start").status_code == 202
    assert house.ask("POST", "/api/grave").status_code == 401
    assert house.ask("POST", "/api/grave", "admin").status_code == 403
    assert house.ask("POST", "/api/grave", "emergency").json().endswith(":emergency")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "evil.example:8000"},
        {"Host": "[::2]:8000"},
        {"Host": "127.0.0.1.evil.example"},
    ],
)
def test_a_web_page_of_another_site_cannot_use_the_open_mode(house: House, headers: dict[str, str]) -> None:
    answer = house.ask("POST", "/api/training/start", headers=headers)
    assert answer.status_code == 403
    assert house.aggregator.starts == 0


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "control"])
def test_this_machine_uses_the_open_mode_without_a_token(house: House, host: str) -> None:
    assert house.ask("POST", "/api/training/start", headers={"Host": host}).status_code == 202
    page = {"Host": host, "Origin": "http://localhost:8000"}
    assert house.ask("POST", "/api/training/start", headers=page).status_code == 202


@pytest.mark.parametrize(("address", "status"), [("10.0.0.7", 403), ("::ffff:10.0.0.7", 403), ("127.0.0.1", 202)])
def test_the_open_mode_is_for_loopback_addresses_only(house: House, address: str, status: int) -> None:
    client = TestClient(house.api, client=(address, 5000))
    assert client.post("/api/training/start").status_code == status


def test_a_token_that_asks_too_often_is_put_off_and_others_are_not(tmp_path: Path) -> None:
    house = House(tmp_path, mode="tokens", requests_per_s=2, burst=2)
    statuses = [house.ask("GET", "/api/training/status", "viewer").status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    limited = house.ask("GET", "/api/training/status", "viewer")
    assert (limited.headers["retry-after"], limited.json()["type"]) == ("1", "/problems/rate-limited")
    assert house.ask("GET", "/api/training/status", "admin").status_code == 200
    house.clock.now_s += 0.5
    assert house.ask("GET", "/api/training/status", "viewer").status_code == 200
    house.store.close()


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "application/json",
        "application/x-www-form-urlencoded",
        "text/plain",
        "application/octet-stream",
        "nonsense",
    ],
)
def test_json_is_json_whatever_its_content_type_says(house: House, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = house.ask("POST", "/api/clients/register", content=json.dumps(BODY).encode(), headers=headers)
    assert answer.status_code == 201
    assert house.store.clients.get("truck-7").capabilities == {"camera": "front"}


@pytest.mark.parametrize("value", ["{...}", "{ … }", "[...]", "..."])
def test_a_placeholder_is_answered_with_an_example_that_works(house: House, value: str) -> None:
    body = f'{{"device_id": "truck-7", "capabilities": {value}}}'
    answer = house.ask("POST", "/api/clients/register", content=body.encode())
    assert (answer.status_code, answer.headers["content-type"]) == (400, PROBLEM)
    assert "placeholder" in answer.json()["detail"]
    assert house.ask("POST", "/api/clients/register", json=answer.json()["example"]).status_code == 201


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "empty"),
        (b"device_id=truck-7", "not JSON"),
        (b"{'device_id': 'x'}", "not JSON"),
        (b'{"device_id": "x"', "not JSON"),
        (b'{"device_id": "x", "device_id": "y"}', "twice"),
        (b'{"device_id": "x", "num_examples": NaN}', "NaN"),
        (b'{"device_id": "x", "num_examples": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"device_id": "x", "num_examples": 1e400}', "1e400"),
        (b'{"device_id": "x", "capabilities": {"a": "\\ud800"}}', "surrogate"),
        ('{"device_id": "é"}'.encode("latin-1"), "UTF-8"),
        ('{"device_id": "x"}'.encode("utf-16"), "UTF-8"),
        (pickle.dumps(BODY), "UTF-8"),
        (pickle.dumps(BODY, protocol=0), "not JSON"),
        (b"[" * 100_000, "deep"),
        (b'{"device_id": "x", "capabilities": ' + b'{"a":' * 40 + b"1" + b"}" * 41, "deep"),
        (b"\x00" * 100, "not JSON"),
    ],
)
def test_what_is_no_json_is_refused_and_changes_nothing(house: House, body: bytes, word: str) -> None:
    answer = house.ask("POST", "/api/clients/register", content=body)
    assert (answer.status_code, answer.headers["content-type"]) == (400, PROBLEM)
    assert word in answer.json()["detail"]
    assert house.store.clients.count() == 2


@pytest.mark.parametrize("value", ["true", '"12"', "1.5", "-1", "null"])
def test_a_value_of_another_type_is_not_translated(house: House, value: str) -> None:
    body = f'{{"device_id": "truck-7", "num_examples": {value}}}'
    answer = house.ask("POST", "/api/clients/register", content=body.encode())
    assert answer.status_code == 422
    assert "num_examples" in answer.json()["detail"]
    assert house.store.clients.count() == 2


@pytest.mark.parametrize("body", [b"null", b"[]", b'"text"', b"7"])
def test_json_that_is_no_object_is_refused(house: House, body: bytes) -> None:
    assert house.ask("POST", "/api/clients/register", content=body).status_code == 422


def test_a_byte_order_mark_does_no_harm(house: House) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(BODY).encode()
    assert house.ask("POST", "/api/clients/register", content=body).status_code == 201


def test_a_huge_body_is_refused_whether_it_says_its_length_or_not(tmp_path: Path) -> None:
    house = House(tmp_path, max_body_bytes=1000)
    sent: list[int] = []

    def chunks() -> Iterator[bytes]:
        for i in range(100):
            sent.append(i)
            yield b" " * 500

    assert house.ask("POST", "/api/clients/register", content=b" " * 1001).status_code == 413
    assert house.ask("POST", "/api/clients/register", content=chunks()).status_code == 413
    lying = {"Content-Length": "9" * 5000}
    assert house.ask("POST", "/api/clients/register", content=b"{}", headers=lying).status_code == 413
    fitting = json.dumps(BODY).encode().ljust(1000)
    assert house.ask("POST", "/api/clients/register", content=fitting).status_code == 201
    house.store.close()


def test_a_compressed_body_is_refused(house: House) -> None:
    answer = house.ask("POST", "/api/clients/register", json=BODY, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("body", "status"), [(b"", 202), (b"{}", 202), (b'{"rounds": 5}', 422), (b"[]", 422), (b"x", 400)]
)
def test_a_route_without_a_body_ignores_nothing(house: House, body: bytes, status: int) -> None:
    answer = house.ask("POST", "/api/training/start", content=body)
    assert answer.status_code == status
    assert ("'rounds'" in answer.text) == (b"rounds" in body)
    assert house.aggregator.starts == (status == 202)


# --- request ids, timeouts, entity tags ------------------------------------------------------------------------------


def test_a_sane_request_id_is_echoed_everywhere(house: House) -> None:
    for path in ("/healthz", "/api/nothing", "/api/model/current"):
        answer = house.ask("GET", path, headers={"X-Request-ID": "abc-1.2_3"})
        assert answer.headers["x-request-id"] == "abc-1.2_3"
    assert answer.json()["request_id"] == "abc-1.2_3"


@pytest.mark.parametrize(
    "given", [b"", b"a b", b"a\tb", b"x" * 65, b"<script>", b"\xff", b"a%0d%0aSet-Cookie: x", b"a\nb: c"]
)
def test_any_other_request_id_is_replaced(house: House, given: bytes) -> None:
    answer = house.client.get("/healthz", headers=[(b"X-Request-ID", given)])
    assert len(answer.headers["x-request-id"]) == 32
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-request-id"] != house.client.get("/healthz").headers["x-request-id"]


def test_what_takes_too_long_is_answered_and_still_audited(tmp_path: Path) -> None:
    house = House(tmp_path, request_timeout_s=0.05)
    may_end, audited = threading.Event(), threading.Event()
    append = house.store.audit.append

    def append_and_tell(facts: Any) -> int:
        sequence = append(facts)
        audited.set()
        return sequence

    house.store.audit.append = append_and_tell  # type: ignore[method-assign]

    @house.api.post("/api/slow", dependencies=[requires(Scope.OPERATOR)])
    def slow(note: Note) -> str:
        assert may_end.wait(30)
        note.after = {"done": True}
        return "done"

    with house.client as client:
        key = {"Idempotency-Key": "k"}
        answer = client.post("/api/slow", headers=key)
        assert (answer.status_code, answer.headers["content-type"]) == (504, PROBLEM)
        assert client.post("/api/slow", headers=key).status_code == 409
        may_end.set()
        assert audited.wait(30)
    (entry,) = house.store.audit.entries()
    assert (entry.facts.status, entry.facts.after) == (200, {"done": True})
    house.store.close()


def test_a_configuration_is_only_overwritten_by_who_has_seen_it(house: House) -> None:
    body = {"min_clients": 2}
    seen = house.ask("GET", "/api/training/config").headers["etag"]
    changed = house.ask("POST", "/api/training/config", json=body, headers={"If-Match": f'"other", {seen}'})
    assert changed.status_code == 200
    for stale in (seen, '"other"', 'W/"1"', "1 2", "", '"' + "9" * 5000 + '"'):
        refused = house.ask("POST", "/api/training/config", json={"min_clients": 3}, headers={"If-Match": stale})
        assert (refused.status_code, refused.headers["content-type"]) == (412, PROBLEM), stale
    assert house.ask("GET", "/api/training/config").json()["min_clients"] == 2
    assert house.ask("POST", "/api/training/config", json=body, headers={"If-Match": "*"}).status_code == 200
    assert house.ask("POST", "/api/training/config", json=body).status_code == 200


# --- idempotency -----------------------------------------------------------------------------------------------------


def test_a_key_makes_a_repeated_request_harmless(guarded: House) -> None:
    key = {"Idempotency-Key": "2030-05-01/1"}
    first = guarded.ask("POST", "/api/training/start", "operator", headers=key)
    again = guarded.ask("POST", "/api/training/start", "operator", headers=key)
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert ("idempotency-replayed" in first.headers, again.headers["idempotency-replayed"]) == (False, "true")
    assert guarded.aggregator.starts == 1
    guarded.ask("POST", "/api/training/start", "admin", headers=key)
    guarded.ask("POST", "/api/training/start", "operator", headers={"Idempotency-Key": "2030-05-01/2"})
    assert guarded.aggregator.starts == 3
    assert guarded.store.audit.verify() == 3


def test_a_key_used_for_another_request_is_refused(house: House) -> None:
    key = {"Idempotency-Key": "k"}
    assert house.ask("POST", "/api/clients/register", json=BODY, headers=key).status_code == 201
    other = house.ask("POST", "/api/clients/register", json=BODY | {"device_id": "truck-8"}, headers=key)
    assert (other.status_code, other.headers["content-type"]) == (409, PROBLEM)
    assert house.store.clients.count() == 3


def test_a_refusal_is_repeated_and_a_failure_may_be_tried_again(house: House) -> None:
    faults: list[Exception] = [RuntimeError("bug")]

    @house.api.post("/api/shaky", dependencies=[requires(Scope.OPERATOR)])
    def shaky() -> str:
        if faults:
            raise faults.pop()
        return "ok"

    key = {"Idempotency-Key": "k"}
    assert [house.ask("POST", "/api/shaky", headers=key).status_code for _ in range(3)] == [500, 200, 200]
    faults.append(StateError("Locked."))
    other = {"Idempotency-Key": "l"}
    assert [house.ask("POST", "/api/shaky", headers=other).status_code for _ in range(2)] == [409, 409]
    assert faults == []


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "é".encode()])
def test_a_key_that_is_none_is_refused(house: House, key: str | bytes) -> None:
    answer = house.ask("POST", "/api/training/start", headers={"Idempotency-Key": key})
    assert answer.status_code == 400
    assert house.aggregator.starts == 0


# --- the audit trail -------------------------------------------------------------------------------------------------


def test_every_change_is_audited_with_before_and_after(guarded: House) -> None:
    headers = {"X-Request-ID": "r-1"}
    guarded.ask("POST", "/api/clients/register", "device", json=BODY, headers=headers)
    guarded.ask("DELETE", "/api/clients/truck-7", "operator")
    guarded.ask("DELETE", "/api/clients/nobody", "operator")
    guarded.ask("POST", "/api/training/stop", "viewer")
    guarded.ask("POST", "/api/training/stop")
    guarded.ask("GET", "/api/training/status", "viewer")
    lines = guarded.ask("GET", "/api/audit", "admin").json()
    assert [(line["action"], line["status"]) for line in lines] == [
        ("POST /api/clients/register", 201),
        ("DELETE /api/clients/{client_id}", 200),
        ("DELETE /api/clients/{client_id}", 404),
        ("POST /api/training/stop", 403),
    ]
    assert [line["scopes"] for line in lines] == [["device"], ["operator"], ["operator"], ["viewer"]]
    assert (lines[0]["request_id"], lines[0]["source"], lines[0]["params"]) == ("r-1", "testclient", {"body": BODY})
    assert lines[0]["before"] is None
    assert (lines[1]["before"]["active"], lines[1]["after"]["active"]) == (True, False)
    assert lines[1]["params"] == {"path": {"client_id": "truck-7"}}
    assert guarded.ask("GET", "/api/audit?limit=1", "admin").json() == lines[-1:]
    assert guarded.ask("GET", "/api/audit?after=2&limit=1", "admin").json() == lines[2:3]
    assert guarded.store.audit.verify() == 4


def test_secrets_reach_neither_trail_nor_log_nor_answer(guarded: House, tmp_path: Path) -> None:
    logger = logging.getLogger("fedvit.control")
    log_to_file(logger, tmp_path / "logs" / "control.log")
    secret, other = guarded.tokens[Scope.OPERATOR], "hunter2-hunter2"
    jwt = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.c2ln"
    capabilities = {"api_token": other, "note": f"Bearer {secret}", secret: 1, "deep": [{"Password": other}, jwt]}
    try:
        body = BODY | {"capabilities": capabilities}
        answer = guarded.ask(
            "POST", f"/api/clients/register?x={secret}", "operator", json=body, headers={"X-Request-ID": "r-2"}
        )
        unknown = guarded.ask("POST", f"/api/{secret}", "operator")
        wrong = guarded.ask("POST", "/api/clients/register", "operator", json={secret: 1})
    finally:
        logger.handlers[0].close()
        logger.removeHandler(logger.handlers[0])
        logger.propagate = True
    assert [a.status_code for a in (answer, unknown, wrong)] == [201, 404, 422]
    log = (tmp_path / "logs" / "control.log").read_text()
    trail = json.dumps([entry.facts.params for entry in guarded.store.audit.entries()])
    line = json.loads(log.splitlines()[0])
    assert (line["request_id"], line["route"], line["status"]) == ("r-2", "/api/clients/register", 201)
    assert line["actor"].endswith(":operator")
    for text in (log, trail):
        for hidden in (secret.split("_", 2)[-1], jwt):
            assert hidden not in text
    assert other not in trail + log
    assert trail.count("[redacted]") >= 5


def test_the_trail_stays_small_whatever_is_sent(house: House) -> None:
    @house.api.post("/api/anything", dependencies=[requires(Scope.OPERATOR)])
    def anything(body: Anything, note: Note) -> str:
        note.before, note.after = float("inf"), {"at": utc_now()}
        return "ok"

    for value in ("x" * 100_000, ["x" * 400] * 1000, {str(i): i for i in range(1000)}, "a\x00b"):
        assert house.ask("POST", "/api/anything", content=json.dumps({"value": value}).encode()).status_code == 200
    for entry in house.store.audit.entries():
        assert len(json.dumps(entry.facts.params)) < 10_000
        assert entry.facts.before == "inf"
    assert house.store.audit.verify() == 4


def test_a_change_that_could_not_be_audited_says_so(house: House) -> None:
    house.ask("POST", "/api/training/start")
    with closing(sqlite3.connect(house.store.home / "state.db")) as connection:
        connection.execute("DELETE FROM audit")
        connection.commit()
    answer = house.ask("POST", "/api/training/start")
    assert (answer.status_code, answer.json()["type"]) == (502, "/problems/integrity")
    assert house.aggregator.starts == 2  # Whoever breaks the trail must not be able to forbid an emergency stop.
    assert house.ask("GET", "/api/training/status").status_code == 200


def test_public_routes_ask_nobody(guarded: House) -> None:
    guarded.api.get("/open", dependencies=[public()])(lambda: "x")
    assert guarded.ask("GET", "/open", headers={"Authorization": "Bearer rubbish"}).status_code == 200


def test_a_wrong_method_is_told_the_right_ones(house: House) -> None:
    for path, methods in {"/api/training/config": "GET, POST", "/api/operations/op-1": "DELETE, GET"}.items():
        answer = house.ask("PUT", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_the_answers_about_a_client_or_an_operation_lead_to_its_routes(house: House) -> None:
    paths = house.api.openapi()["paths"]
    removal = paths["/api/clients/{client_id}"]["delete"]["operationId"]
    registered = paths["/api/clients/register"]["post"]["responses"]["201"]["links"]
    assert registered[removal]["parameters"] == {"client_id": "$response.body#/client_id"}
    watched = paths["/api/edge/optimize"]["post"]["responses"]["202"]["links"]
    assert {paths["/api/operations/{operation_id}"][verb]["operationId"] for verb in ("get", "delete")} <= set(watched)
