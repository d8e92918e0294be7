"""Requests to the control API: bodies, request ids, time limits, entity tags, idempotency keys."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scoped_api import BODY, PROBLEM, ScopedApi

from fedvit.access.identity import Scope
from fedvit.errors import StateError
from serve_apps.control.http.access import Note, requires

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
def test_json_is_json_whatever_its_content_type_says(site: ScopedApi, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = site.ask("POST", "/api/clients/register", content=json.dumps(BODY).encode(), headers=headers)
    assert answer.status_code == 201
    assert site.store.clients.get("truck-7").capabilities == {"camera": "front"}


@pytest.mark.parametrize("value", ["{...}", "{ … }", "[...]", "..."])
def test_a_placeholder_is_answered_with_an_example_that_works(site: ScopedApi, value: str) -> None:
    body = f'{{"device_id": "truck-7", "capabilities": {value}}}'
    answer = site.ask("POST", "/api/clients/register", content=body.encode())
    assert (answer.status_code, answer.headers["content-type"]) == (400, PROBLEM)
    assert "placeholder" in answer.json()["detail"]
    assert site.ask("POST", "/api/clients/register", json=answer.json()["example"]).status_code == 201


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
def test_what_is_no_json_is_refused_and_changes_nothing(site: ScopedApi, body: bytes, word: str) -> None:
    answer = site.ask("POST", "/api/clients/register", content=body)
    assert (answer.status_code, answer.headers["content-type"]) == (400, PROBLEM)
    assert word in answer.json()["detail"]
    assert site.store.clients.count() == 2


@pytest.mark.parametrize("value", ["true", '"12"', "1.5", "-1", "null"])
def test_a_value_of_another_type_is_not_translated(site: ScopedApi, value: str) -> None:
    body = f'{{"device_id": "truck-7", "num_examples": {value}}}'
    answer = site.ask("POST", "/api/clients/register", content=body.encode())
    assert answer.status_code == 422
    assert "num_examples" in answer.json()["detail"]
    assert site.store.clients.count() == 2


@pytest.mark.parametrize("body", [b"null", b"[]", b'"text"', b"7"])
def test_json_that_is_no_object_is_refused(site: ScopedApi, body: bytes) -> None:
    assert site.ask("POST", "/api/clients/register", content=body).status_code == 422


def test_a_byte_order_mark_does_no_harm(site: ScopedApi) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(BODY).encode()
    assert site.ask("POST", "/api/clients/register", content=body).status_code == 201


def test_a_huge_body_is_refused_whether_it_says_its_length_or_not(tmp_path: Path) -> None:
    site = ScopedApi(tmp_path, max_body_bytes=1000)
    sent: list[int] = []

    def chunks() -> Iterator[bytes]:
        for i in range(100):
            sent.append(i)
            yield b" " * 500

    assert site.ask("POST", "/api/clients/register", content=b" " * 1001).status_code == 413
    assert site.ask("POST", "/api/clients/register", content=chunks()).status_code == 413
    lying = {"Content-Length": "9" * 5000}
    assert site.ask("POST", "/api/clients/register", content=b"{}", headers=lying).status_code == 413
    fitting = json.dumps(BODY).encode().ljust(1000)
    assert site.ask("POST", "/api/clients/register", content=fitting).status_code == 201
    site.store.close()


def test_a_compressed_body_is_refused(site: ScopedApi) -> None:
    answer = site.ask("POST", "/api/clients/register", json=BODY, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("body", "status"), [(b"", 202), (b"{}", 202), (b'{"rounds": 5}', 422), (b"[]", 422), (b"x", 400)]
)
def test_a_route_without_a_body_ignores_nothing(site: ScopedApi, body: bytes, status: int) -> None:
    answer = site.ask("POST", "/api/training/start", content=body)
    assert answer.status_code == status
    assert ("'rounds'" in answer.text) == (b"rounds" in body)
    assert site.aggregator.starts == (status == 202)


# --- request ids, timeouts, entity tags ------------------------------------------------------------------------------


def test_a_sane_request_id_is_echoed_everywhere(site: ScopedApi) -> None:
    for path in ("/healthz", "/api/nothing", "/api/model/current"):
        answer = site.ask("GET", path, headers={"X-Request-ID": "abc-1.2_3"})
        assert answer.headers["x-request-id"] == "abc-1.2_3"
    assert answer.json()["request_id"] == "abc-1.2_3"


@pytest.mark.parametrize(
    "given", [b"", b"a b", b"a\tb", b"x" * 65, b"<script>", b"\xff", b"a%0d%0aSet-Cookie: x", b"a\nb: c"]
)
def test_any_other_request_id_is_replaced(site: ScopedApi, given: bytes) -> None:
    answer = site.client.get("/healthz", headers=[(b"X-Request-ID", given)])
    assert len(answer.headers["x-request-id"]) == 32
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-request-id"] != site.client.get("/healthz").headers["x-request-id"]


def test_what_takes_too_long_is_answered_and_still_audited(tmp_path: Path) -> None:
    site = ScopedApi(tmp_path, request_timeout_s=0.05)
    may_end, audited = threading.Event(), threading.Event()
    append = site.store.audit.append

    def append_and_tell(facts: Any) -> int:
        sequence = append(facts)
        audited.set()
        return sequence

    site.store.audit.append = append_and_tell  # type: ignore[method-assign]

    @site.api.post("/api/slow", dependencies=[requires(Scope.OPERATOR)])
    def slow(note: Note) -> str:
        assert may_end.wait(30)
        note.after = {"done": True}
        return "done"

    with site.client as client:
        key = {"Idempotency-Key": "k"}
        answer = client.post("/api/slow", headers=key)
        assert (answer.status_code, answer.headers["content-type"]) == (504, PROBLEM)
        assert client.post("/api/slow", headers=key).status_code == 409
        may_end.set()
        assert audited.wait(30)
    (entry,) = site.store.audit.entries()
    assert (entry.facts.status, entry.facts.after) == (200, {"done": True})
    site.store.close()


def test_a_configuration_is_only_overwritten_by_who_has_seen_it(site: ScopedApi) -> None:
    body = {"min_clients": 2}
    result = site.ask("GET", "/api/training/config").headers["etag"]
    changed = site.ask("POST", "/api/training/config", json=body, headers={"If-Match": f'"other", {result}'})
    assert changed.status_code == 200
    for stale in (result, '"other"', 'W/"1"', "1 2", "", '"' + "9" * 5000 + '"'):
        refused = site.ask("POST", "/api/training/config", json={"min_clients": 3}, headers={"If-Match": stale})
        assert (refused.status_code, refused.headers["content-type"]) == (412, PROBLEM), stale
    assert site.ask("GET", "/api/training/config").json()["min_clients"] == 2
    assert site.ask("POST", "/api/training/config", json=body, headers={"If-Match": "*"}).status_code == 200
    assert site.ask("POST", "/api/training/config", json=body).status_code == 200


# --- idempotency -----------------------------------------------------------------------------------------------------


def test_a_key_makes_a_repeated_request_harmless(guarded: ScopedApi) -> None:
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


def test_a_key_used_for_another_request_is_refused(site: ScopedApi) -> None:
    key = {"Idempotency-Key": "k"}
    assert site.ask("POST", "/api/clients/register", json=BODY, headers=key).status_code == 201
    other = site.ask("POST", "/api/clients/register", json=BODY | {"device_id": "truck-8"}, headers=key)
    assert (other.status_code, other.headers["content-type"]) == (409, PROBLEM)
    assert site.store.clients.count() == 3


def test_a_refusal_is_repeated_and_a_failure_may_be_tried_again(site: ScopedApi) -> None:
    faults: list[Exception] = [RuntimeError("bug")]

    @site.api.post("/api/shaky", dependencies=[requires(Scope.OPERATOR)])
    def shaky() -> str:
        if faults:
            raise faults.pop()
        return "ok"

    key = {"Idempotency-Key": "k"}
    assert [site.ask("POST", "/api/shaky", headers=key).status_code for _ in range(3)] == [500, 200, 200]
    faults.append(StateError("Locked."))
    other = {"Idempotency-Key": "l"}
    assert [site.ask("POST", "/api/shaky", headers=other).status_code for _ in range(2)] == [409, 409]
    assert faults == []


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "é".encode()])
def test_a_key_that_is_none_is_refused(site: ScopedApi, key: str | bytes) -> None:
    answer = site.ask("POST", "/api/training/start", headers={"Idempotency-Key": key})
    assert answer.status_code == 400
    assert site.aggregator.starts == 0
