"""Ids, log lines and durations of requests."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedvit.access.identity import Identity
from fedvit.access.limits import TokenBuckets
from fedvit.metrics.catalogue import BY_NAME, OTHER
from fedvit.metrics.exposition import gauge, histogram
from serve_apps.control.http.access import Requirement
from serve_apps.logs import request_id

LOG = logging.getLogger("fedvit.control")
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
REFUSALS_AT_ONCE = 200
REFUSALS_PER_S = 10.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_REFUSED = frozenset({401, 403, 408, 413, 429, 503})
# One a process, however many applications it builds.
_DURATION = histogram("request_duration_seconds")
_METHOD = BY_NAME["request_duration_seconds"].label("method")
_UNDER_WAY = gauge("queue_depth").labels("requests")


class RequestIds:
    """ASGI middleware: every request has an id, taken from ``X-Request-ID`` if sane; it is echoed and logged.

    Refusals cost their sender nothing: :data:`REFUSALS_PER_S` lines of them are written, and the others counted.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._refusals, self._omitted = TokenBuckets(REFUSALS_PER_S, REFUSALS_AT_ONCE, time.monotonic), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; log what became of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identifier = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = identifier
        reset = request_id.set(identifier)
        _UNDER_WAY.inc()
        try:
            await self._logged(scope, receive, send)
        finally:
            _UNDER_WAY.dec()
            request_id.reset(reset)

    async def _logged(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = scope["state"]["request_id"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - began
            self._log(scope, status, seconds)
            route = getattr(scope.get("route"), "path", OTHER)
            _DURATION.labels(_METHOD.of(scope["method"]), route, f"{status // 100}xx").observe(seconds)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        route, identity = scope.get("route"), scope["state"].get("identity")
        requirement = getattr(route, "requirement", None)
        telemetry = isinstance(requirement, Requirement) and not requirement.audited
        # Vehicles poll: a line for each reading that went well would bury the rest and fill the disk.
        quiet = (scope["method"] in SAFE or telemetry) and status < 500 and status not in (401, 403, 429)
        omitted = 0
        if not quiet and status in _REFUSED:
            if self._refusals.take("") > 0:
                self._omitted += 1
                return
            omitted, self._omitted = self._omitted, 0
        facts = {
            "method": scope["method"][:16],
            "route": getattr(route, "path", None) or f"unknown: {scope['path'][:100]}",
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            "actor": identity.actor if isinstance(identity, Identity) else None,
            "source": scope["state"].get("source"),
            **({"refusals_omitted": omitted} if omitted else {}),
        }
        LOG.log(logging.DEBUG if quiet else logging.INFO, "request", extra=facts)
