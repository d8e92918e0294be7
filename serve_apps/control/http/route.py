"""The route class of the control API: authorization, bodies, idempotency, time limit, audit, log and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Annotated, Any, TypeVar, get_args, get_origin

from fastapi import FastAPI, Query, Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from fedvit.access.identity import Identity
from fedvit.api.base import MAX_INTEGER
from fedvit.api.inbound import BodyLimits, declared_length, read_body
from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import FedvitError, InvalidIdempotencyKeyError, ResponseTimeoutError
from fedvit.ports import ClockPort
from fedvit.store.records import RequestKey, StoredResponse
from fedvit.store.store import Store
from serve_apps.control.http.access import AuditNote, Guard, RequestOrigin, call_key, requirement_of
from serve_apps.control.http.admission import Admission, Slot
from serve_apps.control.http.audit import AuditQuota, facts_of
from serve_apps.control.http.bodies import check_no_fields, example_of, parse_json, with_body
from serve_apps.control.http.request_log import LOG, SAFE, RequestIds
from serve_apps.control.system.in_process_client import ACTING
from serve_apps.problems import documented, problem_of

# Location of an operation and ETag of a revision are part of the response.
_KEPT_HEADERS = ("location", "etag")
_MAX_BYTES = "x-max-bytes"
_BEFORE_BODY, _MAX_JSON_BYTES = "before-body", "max-json-bytes"
# A longer JSON body is parsed in a thread: the event loop answers others meanwhile.
_PARSED_AT_ONCE = 16 * 1024
# Each keeps a row in the store for a day.
_KEYS_OF_A_DEVICE = 100
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_KEY_PARAMETER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A repetition under the same key gets the first answer again, for 24 hours, and changes nothing.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]*$"},
}
# Query parameters that several routes take.
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=MAX_INTEGER)]
# SQLite's integers end there.
RowOffset = Annotated[int, Query(ge=0, le=2**63 - 1)]
OCTETS = "application/octet-stream"
_F = TypeVar("_F", bound=Callable[..., Any])
_Handler = Callable[[Request], Coroutine[Any, Any, Response]]
BeforeBody = Callable[[Identity, Mapping[str, str]], int]
"""A route's own check of the caller and the path's parameters before the body is read; returns the most bytes that it
may have. It may block, and raises FedvitError or RequestValidationError."""
# Without a reference a task may be collected before it is done.
_running: set[asyncio.Task[Response]] = set()


@dataclass(frozen=True, slots=True)
class Control:
    """What :class:`ControlledRoute` needs; ``app.state.control``."""

    guard: Guard
    store: Store
    admission: Admission
    audit: AuditQuota
    clock: ClockPort = SYSTEM_CLOCK


def takes_bytes(max_bytes: int, before_body: BeforeBody | None = None) -> dict[str, Any]:
    """For a route's ``openapi_extra``: its body is bytes, at most ``max_bytes``, and read by the handler.

    Such a route's requirement says ``audited=False``. A request that ``before_body`` refuses has its body not read.
    """
    schema = {"type": "string", "format": "binary"}
    body = {"required": True, "content": {OCTETS: {"schema": schema}}}
    return {"requestBody": body, _MAX_BYTES: max_bytes, _BEFORE_BODY: before_body}


def takes_json(max_bytes: int) -> dict[str, Any]:
    """For a route's ``openapi_extra``: its JSON body has at most ``max_bytes``, less than the setting allows others."""
    return {_MAX_JSON_BYTES: max_bytes}


def route(
    api: FastAPI,
    place: str,
    tag: str,
    dependencies: Sequence[params.Depends],
    *errors: int,
    media_type: str | None = None,
    responses: dict[int | str, dict[str, Any]] | None = None,
    **options: Any,
) -> Callable[[_F], _F]:
    """Add a route at ``place``, "METHOD PATH"; the OpenAPI document has ``errors`` beside those of every route.

    ``media_type`` is for a handler that returns a :class:`fastapi.Response` of that type; ``options`` are FastAPI's.
    """
    method, path = place.split()
    responses = documented(*errors) | (responses or {})
    if media_type is not None:
        schema = {"type": "object" if media_type == "application/json" else "string"}
        responses[200] = {"content": {media_type: {"schema": schema}}}
        options["response_class"] = Response
    return api.api_route(path, methods=[method], tags=[tag], dependencies=dependencies, responses=responses, **options)


def install_control(api: FastAPI, control: Control) -> None:
    """Make every route that is added to ``api`` from now on a :class:`ControlledRoute`."""
    api.state.control = control
    api.router.route_class = ControlledRoute
    api.add_middleware(RequestIds)


class ControlledRoute(APIRoute):
    """A route that declares who may use it, with ``dependencies=[requires(...)]`` or ``[public()]``.

    A request passes, in this order: its token, its scopes and its rate; the announced length of its body; admission
    (:mod:`.admission`); the route's own check; its body, in time, and the form of it; for a mutating one its
    idempotency key; then the handler, within the time limit. A mutating one is audited at the end,
    unless its requirement says ``audited=False``; then it knows no idempotency keys either. Bodies are JSON, unless
    ``openapi_extra`` is :func:`takes_bytes`.

    Raises:
        TypeError: the route declares not one requirement.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        requirement = requirement_of(list(options.get("dependencies") or []))
        if requirement is None:
            raise TypeError(f"The route {path} must declare one of requires(...) and public()")
        self.requirement = requirement
        marks: dict[str, Any] = {"x-scope": [str(scope) for scope in requirement.scopes]}
        if requirement.token_always:
            marks["x-token-always"] = True
        if not requirement.audited:
            marks["x-audited"] = False
        mutating = not set(options.get("methods") or {"GET"}) <= SAFE
        if mutating and requirement.audited:
            marks["parameters"] = [_KEY_PARAMETER]
        options["openapi_extra"] = marks | (options.get("openapi_extra") or {})
        problems = documented(401, 403, *((400, 408, 409, 413, 415, 422) if mutating else ()), 429, 503, 504)
        options["responses"] = problems | (options.get("responses") or {})
        extra = options["openapi_extra"]
        self.before_body: BeforeBody | None = extra.pop(_BEFORE_BODY, None)
        self.max_json_bytes: int | None = extra.pop(_MAX_JSON_BYTES, None)
        self.max_bytes: int | None = extra.get(_MAX_BYTES)
        super().__init__(path, endpoint, **options)
        self.repeatable = any(dependant.call is call_key for dependant in self.dependant.dependencies)
        query = self.dependant.query_params
        self._single = [field.alias for field in query if not _takes_several(field.field_info.annotation)]
        if self.dependant.path_params or query or self.dependant.header_params:
            # FastAPI would document its own form of 422 here, which is never sent.
            self.responses = documented(422) | self.responses

    def get_route_handler(self) -> _Handler:
        """The handler behind all that."""
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await _Call(self, inner, request).answer()
            except ClientDisconnect:
                return Response(status_code=400)
            except Exception as error:
                return problem_of(error)

        return handle

    def check_given_once(self, request: Request) -> None:
        """Which of two values counts, no document says.

        Raises:
            RequestValidationError: a parameter of the query that has one value was given several.
        """
        faults = [
            {"loc": ("query", name), "msg": f"Given {len(values)} times; it has one value", "type": "given_once"}
            for name in self._single
            if len(values := request.query_params.getlist(name)) > 1
        ]
        if faults:
            raise RequestValidationError(faults)

    def example(self) -> Any:
        """A body that this route admits, or None."""
        model = self.body_field.field_info.annotation if self.body_field else None
        return example_of(model) if isinstance(model, type) and issubclass(model, BaseModel) else None


class _Call:
    """One request to a :class:`ControlledRoute`."""

    def __init__(self, route: ControlledRoute, inner: _Handler, request: Request) -> None:
        control: Control = request.app.state.control
        self._control, self._access = control, control.guard.access
        self._guard, self._store, self._clock = control.guard, control.store, control.clock
        self._route, self._inner, self._request = route, inner, request
        self._sender = RequestOrigin.of(request, self._access)
        self._action = f"{request.method} {route.path}"
        self._note = AuditNote()
        self._work: asyncio.Task[Response] | None = None

    async def answer(self) -> Response:
        request, requirement = self._request, self._route.requirement
        identity = await self._identify()
        request.state.identity, request.state.audit_note = identity, self._note
        request.state.source = self._sender.source
        await self._permit(identity)
        self._route.check_given_once(request)
        max_bytes = 0 if request.method in SAFE else self._max_body_bytes()
        length = declared_length(request.headers, max_bytes) if max_bytes else 0
        # A route that asks for no scope answers from memory, and always.
        if not requirement.scopes:
            return await self._admitted(identity, max_bytes)
        slot = await self._control.admission.enter(identity, self._sender.source, length)
        try:
            return await self._admitted(identity, max_bytes)
        finally:
            self._leave(slot)

    async def _permit(self, identity: Identity) -> None:
        requirement = self._route.requirement
        try:
            self._guard.permit(requirement, identity)
        except FedvitError as error:
            # A refusal is audited only with a known identity: unknown callers could fill the disk.
            if identity.authenticated and requirement.audited and self._request.method not in SAFE:
                await self._audit(identity, None, error.http_status)
            raise

    async def _admitted(self, identity: Identity, max_bytes: int) -> Response:
        request = self._request
        if request.method in SAFE:
            return await self._in_time(self._inner(request))
        if self._route.before_body is not None:
            allowed = await run_in_threadpool(self._route.before_body, identity, request.path_params)
            max_bytes = min(max_bytes, allowed)
            declared_length(request.headers, max_bytes)
        content, body = await self._read(max_bytes)
        if not self._route.requirement.audited:
            return await self._in_time(self._inner(with_body(request, content)))
        return await self._mutate(identity, content, body)

    def _leave(self, slot: Slot) -> None:
        """Give the slot back when the work has ended, which may be after the response."""
        if self._work is None or self._work.done():
            slot.release()
        else:
            self._work.add_done_callback(lambda _: slot.release())

    def _max_body_bytes(self) -> int:
        route = self._route
        return route.max_bytes or min(self._access.max_body_bytes, route.max_json_bytes or self._access.max_body_bytes)

    async def _identify(self) -> Identity:
        requirement, acting = self._route.requirement, self._request.scope.get(ACTING)
        if isinstance(acting, Identity):
            return acting
        if self._guard.identifies_at_once(requirement, self._sender):
            return self._guard.identify(requirement, self._sender)
        return await run_in_threadpool(self._guard.identify, requirement, self._sender)

    async def _read(self, max_bytes: int) -> tuple[bytes, Any]:
        limits = BodyLimits(max_bytes, self._access.body_timeout_s, self._access.min_body_bytes_per_s)
        content = await read_body(self._request.stream(), limits)
        if self._route.max_bytes is not None:
            return content, None
        takes_body = self._route.body_field is not None
        if not content and not takes_body:
            return content, None
        parse = partial(parse_json, content, self._access.max_json_depth, self._route.example)
        body = parse() if len(content) <= _PARSED_AT_ONCE else await run_in_threadpool(parse)
        if not takes_body:
            check_no_fields(body)
        return content, body

    async def _mutate(self, identity: Identity, content: bytes, body: Any) -> Response:
        key = self._key(identity, content)
        self._request.state.call_key = None if key is None else _digest(*astuple(key))
        if key is not None:
            keep = None if identity.operates else _KEYS_OF_A_DEVICE
            begin = partial(self._store.idempotency.begin, repeatable=self._route.repeatable, keep=keep)
            stored = await run_in_threadpool(begin, key, self._clock.now())
            if stored is not None:
                headers = {**stored.headers, "Idempotency-Replayed": "true"}
                return Response(stored.body, stored.status, headers, stored.media_type)
        return await self._in_time(self._perform(identity, with_body(self._request, content), body, key))

    async def _perform(self, identity: Identity, request: Request, body: Any, key: RequestKey | None) -> Response:
        try:
            response = await self._inner(request)
        except Exception as error:
            response = problem_of(error)
        if self._note.audited:
            await self._audit(identity, body, response.status_code)
        if key is not None:
            await run_in_threadpool(self._store.idempotency.finish, key, _stored(response))
        return response

    async def _audit(self, identity: Identity, body: Any, status: int) -> None:
        facts = facts_of(self._request, self._action, identity, self._sender.source, body, self._note, status)
        try:
            await run_in_threadpool(self._control.audit.append, facts, identity)
        except FedvitError:
            LOG.critical("The audit trail could not be written", extra={"action": self._action, "status": status})
            raise

    async def _in_time(self, work: Coroutine[Any, Any, Response]) -> Response:
        """Answer 504 when it takes too long; the work itself is not broken off, and is audited when it ends."""
        limit_s = self._access.request_timeout_s
        self._work = task = asyncio.create_task(work)
        _running.add(task)
        task.add_done_callback(_running.discard)
        done, _ = await asyncio.wait({task}, timeout=limit_s)
        if done:
            return task.result()
        task.add_done_callback(_log_late_error)
        message = f"No answer within {limit_s:g} s; the request may still take effect. See the audit trail."
        raise ResponseTimeoutError(message)

    def _key(self, identity: Identity, content: bytes) -> RequestKey | None:
        """The request's idempotency key.

        Raises:
            InvalidIdempotencyKeyError: it is not 1 to 200 visible ASCII characters, or there are several (400).
        """
        given = self._request.headers.getlist("idempotency-key")
        if not given:
            return None
        if len(given) > 1 or not _KEY.fullmatch(given[0]):
            message = "An Idempotency-Key has 1 to 200 visible ASCII characters, and is sent once."
            raise InvalidIdempotencyKeyError(message)
        url = self._request.url
        return RequestKey(identity.actor, self._action, given[0], _digest(url.path, url.query, content))


def _digest(*parts: str | bytes) -> str:
    joined = b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.sha256(joined).hexdigest()


def _stored(response: Response) -> StoredResponse | None:
    """What a repetition gets; None after a fault of the server, so that it may be tried again."""
    if response.status_code >= 500 or not hasattr(response, "body"):
        return None
    headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
    return StoredResponse(response.status_code, bytes(response.body).decode(), response.media_type, headers)


def _log_late_error(task: asyncio.Task[Response]) -> None:
    if not task.cancelled() and task.exception() is not None:
        LOG.error("A request failed after its time was up", exc_info=task.exception())


def _takes_several(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(get_origin(part) is list for part in get_args(annotation))
