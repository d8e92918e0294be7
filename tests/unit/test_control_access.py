"""Access to the control API: scopes, tokens, the open loopback mode, rates."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from scoped_api import FOREIGN_BODIES, IMPLIED, PROBLEM, ScopedApi, filled, operations, takes_json

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.types import utc_now
from serve_apps.control.http.access import CurrentIdentity, public, requires

# --- who may do what -------------------------------------------------------------------------------------------------


def test_every_route_says_who_may_use_it_and_how_it_refuses(guarded: ScopedApi) -> None:
    for method, path, facts in operations(guarded.api):
        scopes = facts["x-scope"]
        assert set(scopes) <= set(Scope)
        assert scopes or path == "/healthz"
        assert facts.get("security", []) == ([{"token": []}] if scopes else [])
        for status in ("401", "403", "429"):
            assert PROBLEM in facts["responses"][status]["content"], (method, path)
        if method != "GET":
            assert set(scopes) & {"operator", "admin", "emergency", "device"}, (method, path)


def test_every_body_refuses_unknown_fields(guarded: ScopedApi) -> None:
    schemas = guarded.api.openapi()["components"]["schemas"]
    bodies = [facts["requestBody"] for _, _, facts in operations(guarded.api) if takes_json(facts)]
    assert bodies
    for body in bodies:
        name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
        assert (name in FOREIGN_BODIES) == (schemas[name].get("additionalProperties") is not False)


def test_every_body_is_explained_by_an_example_that_is_admitted(guarded: ScopedApi) -> None:
    for method, path, facts in operations(guarded.api):
        if not takes_json(facts):
            continue
        url = filled(path.replace("{round_index}", "1"))
        scope = facts["x-scope"][0]
        refused = guarded.ask(method, url, scope, content=b"{...}")
        assert refused.status_code == 400, (method, path)
        assert guarded.ask(method, url, scope, json=refused.json()["example"]).status_code not in (400, 422), path


@pytest.mark.parametrize("held", list(Scope))
def test_each_scope_opens_its_routes_and_no_other(guarded: ScopedApi, held: Scope) -> None:
    for method, path, facts in operations(guarded.api):
        answer = guarded.ask(method, filled(path), held)
        allowed = not facts["x-scope"] or bool(IMPLIED[held] & set(facts["x-scope"]))
        assert (answer.status_code == 403) != allowed, (method, path, answer.text)
        assert answer.status_code != 401
        if not allowed:
            assert answer.headers["content-type"] == PROBLEM
            assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


def test_without_a_token_only_public_routes_answer(guarded: ScopedApi) -> None:
    for method, path, facts in operations(guarded.api):
        answer = guarded.ask(method, filled(path))
        assert (answer.status_code == 401) == bool(facts["x-scope"]), (method, path)
        if facts["x-scope"]:
            assert answer.headers["content-type"] == PROBLEM
            assert answer.headers["www-authenticate"] == 'Bearer realm="fedvit"'
    assert guarded.aggregator.starts == 0


def test_the_matrix_leaves_no_route_out(guarded: ScopedApi) -> None:
    """What the document does not show is the document itself and the page that lists its routes."""
    routes = [route for route in guarded.api.routes if isinstance(route, APIRoute)]
    served = {(method, route.path) for route in routes for method in route.methods}
    shown = {(method, path) for method, path, _ in operations(guarded.api)}
    assert served - shown == {("GET", "/openapi.json"), ("GET", "/docs")}
    assert shown < served
    assert len(routes) == len(guarded.api.routes)


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
def test_the_reference_asks_for_a_token_and_loads_nothing(guarded: ScopedApi, path: str) -> None:
    assert guarded.ask("GET", path).status_code == 401
    assert guarded.ask("GET", path, "device").status_code == 403
    answer = guarded.ask("GET", path, "viewer")
    assert answer.status_code == 200
    assert "/api/clients/{client_id}/heartbeat" in answer.text
    if path == "/docs":
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"<script|<link|src=|https?://", answer.text)


@pytest.mark.parametrize("kind", ["expired", "revoked", "invented"])
def test_no_token_that_is_not_good_opens_a_route(guarded: ScopedApi, kind: str) -> None:
    past = utc_now() - timedelta(days=2)
    lifetime = timedelta(days=1) if kind == "expired" else None
    result = create_token(
        guarded.store, kind, [Scope.ADMIN, Scope.EMERGENCY, Scope.RELEASES], now=past, lifetime=lifetime
    )
    if kind == "revoked":
        guarded.store.tokens.revoke(result.token.token_id, utc_now())
    text = f"{result.text[:-43]}{'A' * 43}" if kind == "invented" else result.text
    # One after another they would only be told to wait.
    for method, path, facts in operations(guarded.api):
        guarded.clock.advance(1000)
        headers = {"Authorization": f"Bearer {text}"}
        answer = guarded.ask(method, filled(path), headers=headers)
        assert (answer.status_code == 401) == bool(facts["x-scope"]), (method, path)
    assert guarded.aggregator.starts == 0
    assert guarded.store.audit.entries() == []


def test_the_matrix_knows_every_scope() -> None:
    assert set(IMPLIED) == set(Scope)


def test_a_route_that_says_nothing_cannot_be_added(site: ScopedApi) -> None:
    with pytest.raises(TypeError, match="/api/secret"):
        site.api.get("/api/secret")(lambda: "x")


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
def test_a_bad_token_is_refused_counted_and_not_repeated(site: ScopedApi, header: str, reason: str) -> None:
    before = site.refused(reason)
    answer = site.client.get("/api/training/status", headers={"Authorization": header.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="fedvit", error="invalid_token"'
    assert "fvt_0" not in answer.text
    assert site.refused(reason) == before + 1


def test_two_tokens_in_one_request_are_none(guarded: ScopedApi) -> None:
    good = f"Bearer {guarded.tokens[Scope.ADMIN]}"
    headers = [("Authorization", good), ("Authorization", good)]
    assert guarded.client.get("/api/training/status", headers=headers).status_code == 401


def test_revoked_and_expired_tokens_say_so(guarded: ScopedApi) -> None:
    result = create_token(
        guarded.store, "old", ["admin"], now=utc_now() - timedelta(days=2), lifetime=timedelta(days=1)
    )
    guarded.tokens[Scope.ADMIN] = result.text
    assert "expired" in guarded.ask("GET", "/api/audit", "admin").json()["detail"]
    guarded.store.tokens.revoke(result.token.token_id, utc_now())
    assert "revoked" in guarded.ask("GET", "/api/audit", "admin").json()["detail"]


def test_too_many_bad_tokens_are_put_off_and_a_good_one_still_passes(tmp_path: Path) -> None:
    site = ScopedApi(tmp_path, mode="tokens", max_failed_attempts=3, failed_attempts_window_s=60)
    bad = {"Authorization": f"Bearer fvt_{'0' * 12}_{'A' * 43}"}
    assert [site.ask("GET", "/api/audit", headers=bad).status_code for _ in range(4)] == [401, 401, 401, 429]
    assert site.ask("GET", "/api/audit", headers=bad).headers["retry-after"] == "60"
    assert site.ask("GET", "/api/audit", "admin").status_code == 200
    site.clock.advance(61)
    assert site.ask("GET", "/api/audit", headers=bad).status_code == 401
    site.store.close()


def test_what_is_grave_demands_a_token_on_loopback_too(site: ScopedApi) -> None:
    @site.api.post("/api/grave", dependencies=[requires(Scope.EMERGENCY, token_always=True)])
    def grave(who: CurrentIdentity) -> str:
        return who.actor

    assert site.ask("POST", "/api/training/start").status_code == 202
    assert site.ask("POST", "/api/grave").status_code == 401
    assert site.ask("POST", "/api/grave", "admin").status_code == 403
    assert site.ask("POST", "/api/grave", "emergency").json().endswith(":emergency")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "evil.example:8000"},
        {"Host": "[::2]:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:3000"},
        {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1"},
        {"Host": "127.0.0.1:8000", "Origin": "https://127.0.0.1:8000"},
        {"Host": "127.0.0.1:8000", "Origin": "http://localhost:8000"},
        {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000/"},
        {"Host": "127.0.0.1:8000", "Origin": "http://x@127.0.0.1:8000"},
        {"Host": "[", "Origin": "http://["},
    ],
)
def test_a_web_page_of_another_site_cannot_use_the_open_mode(site: ScopedApi, headers: dict[str, str]) -> None:
    answer = site.ask("POST", "/api/training/start", headers=headers)
    assert answer.status_code == 403
    assert site.aggregator.starts == 0


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "control"])
def test_this_machine_uses_the_open_mode_without_a_token(site: ScopedApi, host: str) -> None:
    assert site.ask("POST", "/api/training/start", headers={"Host": host}).status_code == 202
    page = {"Host": host, "Origin": f"http://{host}"}
    assert site.ask("POST", "/api/training/start", headers=page).status_code == 202


@pytest.mark.parametrize(("address", "status"), [("10.0.0.7", 403), ("::ffff:10.0.0.7", 403), ("127.0.0.1", 202)])
def test_the_open_mode_is_for_loopback_addresses_only(site: ScopedApi, address: str, status: int) -> None:
    client = TestClient(site.api, client=(address, 5000))
    assert client.post("/api/training/start").status_code == status


def test_a_token_that_asks_too_often_is_put_off_and_others_are_not(tmp_path: Path) -> None:
    site = ScopedApi(tmp_path, mode="tokens", requests_per_s=2, burst=2)
    statuses = [site.ask("GET", "/api/training/status", "viewer").status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    limited = site.ask("GET", "/api/training/status", "viewer")
    assert (limited.headers["retry-after"], limited.json()["type"]) == ("1", "/problems/rate-limited")
    assert site.ask("GET", "/api/training/status", "admin").status_code == 200
    site.clock.advance(0.5)
    assert site.ask("GET", "/api/training/status", "viewer").status_code == 200
    site.store.close()


def test_public_routes_ask_nobody(guarded: ScopedApi) -> None:
    guarded.api.get("/open", dependencies=[public()])(lambda: "x")
    assert guarded.ask("GET", "/open", headers={"Authorization": "Bearer rubbish"}).status_code == 200


def test_a_wrong_method_is_told_the_right_ones(site: ScopedApi) -> None:
    for path, methods in {"/api/training/config": "GET, POST", "/api/operations/op-1": "DELETE, GET"}.items():
        answer = site.ask("PUT", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_the_answers_about_a_client_or_an_operation_lead_to_its_routes(site: ScopedApi) -> None:
    paths = site.api.openapi()["paths"]
    removal = paths["/api/clients/{client_id}"]["delete"]["operationId"]
    registered = paths["/api/clients/register"]["post"]["responses"]["201"]["links"]
    assert registered[removal]["parameters"] == {"client_id": "$response.body#/client_id"}
    watched = paths["/api/edge/optimize"]["post"]["responses"]["202"]["links"]
    assert {paths["/api/operations/{operation_id}"][verb]["operationId"] for verb in ("get", "delete")} <= set(watched)
