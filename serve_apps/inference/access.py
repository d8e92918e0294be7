"""Access to the inference application, with the guard of the control API: both listen on the same port."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fedvit.access.identity import Scope as AccessScope
from fedvit.errors import FedvitError
from serve_apps.control.http.access import Guard, RequestOrigin, Requirement
from serve_apps.problems import problem_of

# A prober holds no token and learns nothing but the version.
OPEN_PATHS = frozenset({"/health"})
REQUIREMENT = Requirement((AccessScope.VIEWER, AccessScope.DEVICE))


class InferenceGuard:
    """ASGI middleware: the scope viewer or device, by the rules of ``access.mode``; no rate is counted here."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401, 403 or 429 with a problem document."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path not in OPEN_PATHS:
            sender = RequestOrigin.of(Request(scope), self._guard.access)
            try:
                await run_in_threadpool(self._check, sender)
            except FedvitError as error:
                await problem_of(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, sender: RequestOrigin) -> None:
        self._guard.check_scope(REQUIREMENT, self._guard.identify(REQUIREMENT, sender))
