"""Access to the inference application, with the guard of the control API: both listen on the same port."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fedvit.access.identity import Identity
from fedvit.access.identity import Scope as AccessScope
from fedvit.api.inbound import declared_length
from fedvit.errors import FedvitError
from fedvit.wire.images import MAX_IMAGE_BYTES
from serve_apps.control.http.access import Guard, RequestOrigin, Requirement
from serve_apps.control.http.admission import Admission
from serve_apps.problems import problem_of

# A prober holds no token and learns nothing but the version.
OPEN_PATHS = frozenset({"/health"})
REQUIREMENT = Requirement((AccessScope.VIEWER, AccessScope.DEVICE))


class InferenceGuard:
    """ASGI middleware: the scope viewer or device, by the rules of ``access.mode``, and admission before the body.

    No rate is counted here.
    """

    def __init__(self, app: ASGIApp, guard: Guard, admission: Admission) -> None:
        self._app, self._guard, self._admission = app, guard, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401, 403, 413, 415, 429 or 503 with a problem document."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        sender = RequestOrigin.of(request, self._guard.access)
        try:
            identity = await run_in_threadpool(self._check, sender)
            length = declared_length(request.headers, MAX_IMAGE_BYTES)
            slot = await self._admission.enter(identity, sender.source, length)
        except FedvitError as error:
            await problem_of(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            slot.release()

    def _check(self, sender: RequestOrigin) -> Identity:
        identity = self._guard.identify(REQUIREMENT, sender)
        self._guard.check_scope(REQUIREMENT, identity)
        return identity
