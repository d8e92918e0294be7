"""Authorization of routes: declared at the route with :func:`requires`, enforced by the :class:`Guard`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request, params
from fastapi.security import HTTPBearer
from starlette.requests import HTTPConnection

from fedvit.access.identity import ANONYMOUS, Identity, Scope
from fedvit.access.limits import FailureWindow, TokenBuckets, whole_seconds
from fedvit.access.tokens import PREFIX, verify_token
from fedvit.api.inbound import foreign_request
from fedvit.api.transport import is_loopback
from fedvit.clock import SYSTEM_CLOCK
from fedvit.config import AccessConfig, Settings
from fedvit.errors import FedvitError, ForbiddenError, RateLimitedError, UnauthorizedError
from fedvit.metrics.exposition import counter
from fedvit.ports import ClockPort
from fedvit.store.store import Store
from serve_apps.control.http.write_behind import WriteBehind

if TYPE_CHECKING:
    from fedvit.access.oidc import OidcVerifier

# One a process, however many applications it builds.
_REFUSED = counter("unauthorized_requests_total")
_NOBODY = Identity("anonymous", frozenset(), authenticated=False)


class Requirement:
    """What a route demands: one of ``scopes``, or nothing where there are none.

    Args:
        scopes: any one of them suffices.
        token_always: a token is demanded in the open loopback mode, too.
        audited: whether a call that is not safe leaves a line in the audit trail; see :func:`requires`.
    """

    def __init__(self, scopes: tuple[Scope, ...], *, token_always: bool = False, audited: bool = True) -> None:
        self.scopes, self.token_always, self.audited = scopes, token_always, audited

    async def __call__(self, request: HTTPConnection) -> None:
        """Make sure that the guard was asked; only :class:`ControlledRoute` asks it."""
        if not isinstance(getattr(request.state, "identity", None), Identity):
            raise RuntimeError(f"{request.url.path} is guarded by nobody; use ControlledRoute for its router")


class TokenRequirement(Requirement, HTTPBearer):
    """A requirement that a bearer token meets; the OpenAPI document shows it as one."""

    def __init__(self, scopes: tuple[Scope, ...], *, token_always: bool = False, audited: bool = True) -> None:
        HTTPBearer.__init__(self, auto_error=False, scheme_name="token", bearerFormat="fvt_<token_id>_<secret>")
        Requirement.__init__(self, scopes, token_always=token_always, audited=audited)


def requires(*any_of: Scope, token_always: bool = False, audited: bool = True) -> params.Depends:
    """For a route's ``dependencies``: the request's token must hold one of these scopes.

    ``audited=False`` is for telemetry, which changes no decision: such a call leaves no line in the
    audit trail, also when it is refused, none in the log when it went well, and a repetition is simply done again.
    """
    if not any_of:
        raise ValueError("requires() names no scope; say public() where none is needed")
    return params.Depends(TokenRequirement(any_of, token_always=token_always, audited=audited))


def public() -> params.Depends:
    """For a route's ``dependencies``: no token is needed."""
    return params.Depends(Requirement(()))


VIEWER = [requires(Scope.VIEWER)]
OPERATOR = [requires(Scope.OPERATOR)]
ADMIN = [requires(Scope.ADMIN)]
EMERGENCY = [requires(Scope.EMERGENCY, token_always=True)]
# Vehicles and replicas fetch releases with a scope that allows nothing else.
FOLLOWER = [requires(Scope.VIEWER, Scope.RELEASES)]


def requirement_of(dependencies: list[Any]) -> Requirement | None:
    """The requirement among a route's dependencies."""
    requirements = [d.dependency for d in dependencies if isinstance(d.dependency, Requirement)]
    return requirements[0] if len(requirements) == 1 else None


@dataclass(frozen=True, slots=True)
class RequestOrigin:
    """What a request shows of its sender."""

    source: str
    authorization: tuple[str, ...]
    host: str
    origin: str | None
    scheme: str

    @classmethod
    def of(cls, request: Request, access: AccessConfig) -> RequestOrigin:
        """Read it off a request; behind an acknowledged proxy the source is what that proxy saw."""
        source = request.client.host if request.client else "local"
        # Only the last entry is the proxy's own; all before it are what the caller claims.
        forwarded = request.headers.get("x-forwarded-for", "").rsplit(",", 1)[-1].strip()
        if access.behind_tls_proxy and _is_address(forwarded):
            source = forwarded
        return cls(
            source=source[:64],
            authorization=tuple(request.headers.getlist("authorization")),
            host=request.headers.get("host", ""),
            origin=request.headers.get("origin"),
            scheme=request.scope.get("scheme", "http"),
        )


class Guard:
    """Identifies the sender of a request and checks its scopes. Identifying a token blocks on the store: use a thread.

    Attributes:
        tokens_used: the buffer of the tokens' last use, in front of the store.

    Raises:
        ConfigError: the OIDC key set cannot be read.
    """

    def __init__(self, settings: Settings, store: Store, clock: ClockPort = SYSTEM_CLOCK) -> None:
        self.access = settings.access
        self._host = settings.serving.host
        self._store, self._clock = store, clock
        self.tokens_used = WriteBehind(store.tokens.set_last_used)
        self._buckets = TokenBuckets(self.access.requests_per_s, self.access.burst, clock.monotonic)
        window_s = self.access.failed_attempts_window_s
        self._failures = FailureWindow(self.access.max_failed_attempts, window_s, clock.monotonic)
        self._oidc: OidcVerifier | None = None
        if self.access.oidc is not None:
            # Imported here: without OIDC the package it needs may be missing.
            from fedvit.access.oidc import OidcVerifier

            self._oidc = OidcVerifier(self.access.oidc)

    def identify(self, requirement: Requirement, sender: RequestOrigin) -> Identity:
        """The identity of the sender.

        Raises:
            UnauthorizedError: no token, or no good one.
            ForbiddenError: the open loopback mode was reached from elsewhere.
            RateLimitedError: too many bad tokens from this address.
        """
        if not requirement.scopes:
            return _NOBODY
        if not sender.authorization:
            return self._without_token(requirement, sender)
        try:
            return self._verified(sender)
        except UnauthorizedError as error:
            # A good token always passes: 256 bits cannot be guessed, and many senders may share the address of a proxy.
            wait_s = self._failures.fail(sender.source)
            if not wait_s:
                raise _counted(error, error.details["reason"]) from None
            message, cure = "Too many bad tokens came from this address.", "Wait, then send a good one."
            limited = RateLimitedError(message, cure=cure, retry_after_s=whole_seconds(wait_s))
            raise _counted(limited, "too_many_failures") from None

    @staticmethod
    def identifies_at_once(requirement: Requirement, sender: RequestOrigin) -> bool:
        """Whether :meth:`identify` blocks on nothing: there is no token to look up."""
        return not requirement.scopes or not sender.authorization

    def permit(self, requirement: Requirement, identity: Identity) -> None:
        """Make sure that ``identity`` may use the route now.

        Raises:
            ForbiddenError: it holds none of the scopes.
            RateLimitedError: it asks too often.
        """
        self.check_scope(requirement, identity)
        wait_s = self._buckets.take(identity.actor) if identity.authenticated else 0.0
        if wait_s:
            retry_s = whole_seconds(wait_s)
            raise RateLimitedError("This token asks too often.", cure="Wait, then ask again.", retry_after_s=retry_s)

    def check_scope(self, requirement: Requirement, identity: Identity) -> None:
        """Make sure that ``identity`` holds what is demanded, however often it asks.

        Raises:
            ForbiddenError: it holds none of the scopes.
        """
        if not requirement.scopes or identity.may(requirement.scopes):
            return
        needed = " or ".join(requirement.scopes)
        message, cure = f"This route needs the scope {needed}.", f"Use a token with the scope {needed}."
        raise _counted(ForbiddenError(message, cure=cure, required=list(requirement.scopes)), "scope")

    def _verified(self, sender: RequestOrigin) -> Identity:
        scheme, _, text = sender.authorization[0].partition(" ")
        if len(sender.authorization) > 1 or scheme.lower() != "bearer":
            message = "The Authorization header is not one bearer token."
            raise UnauthorizedError(message, cure="Send Authorization: Bearer TOKEN, once.", reason="malformed")
        if self._oidc is not None and not text.startswith(PREFIX):
            return self._oidc.verify(text.strip())
        return verify_token(self._store, text.strip(), self._clock.now(), used=self.tokens_used.put)

    def _without_token(self, requirement: Requirement, sender: RequestOrigin) -> Identity:
        if requirement.token_always or self.access.mode != "open_loopback":
            message, cure = "This route needs a bearer token.", "Send Authorization: Bearer TOKEN."
            raise _counted(UnauthorizedError(message, cure=cure, reason="missing"), "missing")
        fault = self._foreign(sender)
        if fault is not None:
            message = f"{fault}, and without a token only this machine may ask."
            raise _counted(ForbiddenError(message, cure="Send a token."), "foreign")
        return ANONYMOUS

    def _foreign(self, sender: RequestOrigin) -> str | None:
        """Why an anonymous request is not from a user of this machine; web pages may send requests, too."""
        if _is_address(sender.source) and not is_loopback(sender.source):
            return f"The request comes from {sender.source}"
        return foreign_request(sender.host, sender.origin, sender.scheme, self._host)


# Both async: FastAPI hands anything else to a thread, and there is nothing to wait for.
async def current_identity(request: Request) -> Identity:
    """The identity of the sender, for handlers."""
    identity: Identity = request.state.identity
    return identity


@dataclass(slots=True)
class AuditNote:
    """The state ``before`` and ``after`` a handler's change, for the audit trail. JSON types only.

    ``audited`` is False for a call that changed nothing and shall leave no line.
    """

    before: Any = None
    after: Any = None
    audited: bool = True


async def _audit_note(request: Request) -> AuditNote:
    note: AuditNote = request.state.audit_note
    return note


def call_key(request: Request) -> str | None:
    """What stays the same when a request is repeated under its Idempotency-Key; None where it named none.

    A handler that asks for it promises that a repetition does nothing twice, and is then not kept waiting for a first
    request whose process may have died.
    """
    key: str | None = request.state.call_key
    return key


CallKey = Annotated[str | None, Depends(call_key)]
CurrentIdentity = Annotated[Identity, Depends(current_identity)]
Note = Annotated[AuditNote, Depends(_audit_note)]


def _counted(error: FedvitError, reason: str) -> FedvitError:
    _REFUSED.labels(reason).inc()
    return error


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
