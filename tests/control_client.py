"""Ways for a client of the control API that lead to no network."""

from __future__ import annotations

import re
from collections.abc import Collection

import httpx
from fastapi.testclient import TestClient

URL = "http://testserver"


class SentError(Exception):
    """Carries what would have gone over the line."""

    def __init__(self, request: httpx.Request) -> None:
        super().__init__(str(request.url))
        self.request = request


class Recorder(httpx.BaseTransport):
    """Lets nothing through, and shows what it was."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        raise SentError(request)


class Through(httpx.BaseTransport):
    """Carries requests to an application.

    Attributes:
        sent: what arrived there, as ``METHOD path``.
        lose: how many answers get lost on the way back.
    """

    def __init__(self, http: TestClient) -> None:
        self._http = http
        self.sent: list[str] = []
        self.keys: list[str | None] = []
        self.lose = 0

    @property
    def changes(self) -> list[str]:
        """What was sent that changes something."""
        return [line for line in self.sent if not line.startswith("GET ")]

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(f"{request.method} {request.url.path}")
        self.keys.append(request.headers.get("idempotency-key"))
        answer = self._http.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        if self.lose:
            self.lose -= 1
            raise httpx.ReadError("The line broke.")
        return httpx.Response(answer.status_code, headers=list(answer.headers.items()), content=answer.content)


def route_of(request: httpx.Request, known: Collection[str]) -> str:
    """The route that a request finds; one with fewer placeholders goes first."""
    asked = f"{request.method} {request.url.path}"
    results = [route for route in known if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(route)), asked)]
    assert results, f"{asked} is no route"
    return min(results, key=lambda route: route.count("{"))
