"""In-process client: calls of the control API to itself, audited under a name that no token has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from fedvit.access.identity import Identity
from fedvit.access.identity import Scope as AccessScope

ACTING = "fedvit.acting"
"""The key of the ASGI scope that holds the acting identity. Servers make scopes; no request can set it."""

# Names of tokens' and subjects' actors have a prefix; this has none.
REMEDIATION = Identity("remediation", frozenset({AccessScope.OPERATOR}), authenticated=True)


async def call_as(
    api: FastAPI, identity: Identity, method: str, path: str, body: Mapping[str, Any] | None, *, key: str
) -> httpx.Response:
    """The answer of ``api`` to a request of ``identity`` under an Idempotency-Key; audited like any other."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await api({**scope, ACTING: identity}, receive, send)

    transport = httpx.ASGITransport(application, raise_app_exceptions=False, client=(identity.actor, 0))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, path, json=body, headers={"Idempotency-Key": key}, timeout=None)
