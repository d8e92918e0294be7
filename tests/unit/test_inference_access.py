"""The inference application lets in whom the control API would, and nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scoped_api import scoped_token
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from fedvit.access.identity import Scope
from fedvit.settings import load_settings
from fedvit.store.store import Store
from serve_apps.control.http.access import Guard
from serve_apps.control.http.admission import Admission
from serve_apps.inference.access import InferenceGuard


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as opened:
        yield opened


def application(store: Store, **access: Any) -> TestClient:
    """A stand-in for the replica under its route prefix."""

    async def answer(_: Request) -> JSONResponse:
        return JSONResponse({"label": "red"})

    settings = load_settings(environ={}, overrides={"home": store.home, "access": access})
    guard, admission = Guard(settings, store), Admission(settings.access)
    routes = [Route("/infer", answer, methods=["POST"]), Route("/health", answer)]
    replica = Starlette(routes=routes, middleware=[Middleware(InferenceGuard, guard=guard, admission=admission)])
    return TestClient(Starlette(routes=[Mount("/inference", replica)]), base_url="http://localhost")


def ask(client: TestClient, token: str | None = None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return client.post("/inference/infer", content=b"image", headers=headers).status_code


def test_where_tokens_are_demanded_only_viewers_and_devices_are_answered(store: Store) -> None:
    client = application(store, mode="tokens")
    answers = {scope: ask(client, scoped_token(store, scope)) for scope in Scope}
    allowed = {scope for scope, status in answers.items() if status == 200}
    assert allowed == {Scope.VIEWER, Scope.OPERATOR, Scope.ADMIN, Scope.EMERGENCY, Scope.DEVICE}
    assert (ask(client), ask(client, "nonsense")) == (401, 401)
    assert client.get("/inference/health").status_code == 200


def test_a_refusal_is_a_problem_document(store: Store) -> None:
    answer = application(store, mode="tokens").post("/inference/infer", content=b"image")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "/problems/unauthorized"


def test_on_open_loopback_no_token_is_needed_and_a_foreign_page_is_refused(store: Store) -> None:
    client = application(store)
    assert ask(client) == 200
    for origin in ("https://evil.example", "http://localhost:3000", "null"):
        foreign = client.post("/inference/infer", content=b"image", headers={"Origin": origin})
        assert foreign.status_code == 403, origin
    own = client.post("/inference/infer", content=b"image", headers={"Origin": "http://localhost"})
    assert own.status_code == 200
