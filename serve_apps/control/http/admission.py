"""Admission control: how many requests, and how many bytes of request bodies, one process works on at once.

A caller has a limit of its own. Devices and operators have a share each, so that devices never use what operators need.
A request is admitted before its body is read, and leaves when its work has ended.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from fedvit.access.identity import Identity, Scope
from fedvit.config import AccessConfig
from fedvit.errors import OverloadedError, RateLimitedError

WAIT_S = 5.0
SMALL_BODY_BYTES = 64 * 1024
"""A request with a longer body does not wait for its admission: meanwhile the body would fill the memory."""
WAITING_PER_REQUEST = 4
_POLLS = 500
_READERS = frozenset({Scope.VIEWER, Scope.OPERATOR, Scope.ADMIN, Scope.EMERGENCY})


@dataclass(slots=True)
class _Use:
    """What a caller, or a share, has in work now."""

    requests: int = 0
    body_bytes: int = 0

    def add(self, sign: int, body_bytes: int) -> None:
        self.requests += sign
        self.body_bytes += sign * body_bytes

    def has_room(self, body_bytes: int, max_requests: int, max_body_bytes: int | None) -> bool:
        """Whether one more request fits; one body is admitted whatever its length."""
        if self.requests >= max_requests:
            return False
        return (
            not body_bytes
            or not self.body_bytes
            or max_body_bytes is None
            or (self.body_bytes + body_bytes <= max_body_bytes)
        )


@dataclass(slots=True)
class _Share:
    """The requests of a group of callers."""

    name: str
    max_requests: int
    max_body_bytes: int | None
    use: _Use = field(default_factory=_Use)
    waiting: int = 0


class Slot:
    """The place of one admitted request; :meth:`release` gives it back, once."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the place back; harmless when repeated."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Admission:
    """The limits of ``access``, in one process. For any thread and event loop."""

    def __init__(self, access: AccessConfig) -> None:
        self._access = access
        self._lock = threading.Lock()
        self._callers: dict[str, _Use] = {}
        self._operators = _Share("operators", access.max_operator_requests, None)
        self._devices = _Share("devices", access.max_device_requests, access.max_device_body_bytes)

    async def enter(self, identity: Identity, source: str, body_bytes: int) -> Slot:
        """Admit a request.

        Args:
            source: the caller's address, for callers without a token.
            body_bytes: the longest body that the request may have.

        Raises:
            RateLimitedError: the caller has too much in work already.
            OverloadedError: its share has, and it waited in vain.
        """
        share = self._devices if identity.scopes.isdisjoint(_READERS) else self._operators
        caller = identity.actor if identity.authenticated else source
        self._enter_caller(caller, share, body_bytes, limited=identity.authenticated)
        try:
            await self._enter_share(share, body_bytes)
        except BaseException:
            self._leave_caller(caller, body_bytes)
            raise
        return Slot(lambda: self._leave(caller, share, body_bytes))

    def _enter_caller(self, caller: str, share: _Share, body_bytes: int, *, limited: bool) -> None:
        # Without tokens all programs of this machine are one caller, which only the share limits.
        most = self._access.max_requests_per_caller if limited else share.max_requests * (1 + WAITING_PER_REQUEST)
        with self._lock:
            use = self._callers.get(caller) or _Use()
            if not use.has_room(body_bytes, most, self._access.max_body_bytes_per_caller):
                raise RateLimitedError(
                    f"{use.requests} requests of this caller are in work, with {use.body_bytes} bytes.",
                    cure="Wait until one of them is answered.",
                    retry_after_s=1,
                )
            use.add(1, body_bytes)
            self._callers[caller] = use

    async def _enter_share(self, share: _Share, body_bytes: int) -> None:
        if self._took(share, body_bytes):
            return
        if body_bytes <= SMALL_BODY_BYTES and self._waits(share, 1):
            try:
                for _ in range(_POLLS):
                    await asyncio.sleep(WAIT_S / _POLLS)
                    if self._took(share, body_bytes):
                        return
            finally:
                self._waits(share, -1)
        raise OverloadedError(
            f"{share.use.requests} requests of {share.name} are in work already; no more are taken.",
            cure="Ask again later.",
            retry_after_s=1,
        )

    def _took(self, share: _Share, body_bytes: int) -> bool:
        with self._lock:
            if not share.use.has_room(body_bytes, share.max_requests, share.max_body_bytes):
                return False
            share.use.add(1, body_bytes)
            return True

    def _waits(self, share: _Share, change: int) -> bool:
        with self._lock:
            if change > 0 and share.waiting >= WAITING_PER_REQUEST * share.max_requests:
                return False
            share.waiting += change
            return True

    def _leave(self, caller: str, share: _Share, body_bytes: int) -> None:
        with self._lock:
            share.use.add(-1, body_bytes)
        self._leave_caller(caller, body_bytes)

    def _leave_caller(self, caller: str, body_bytes: int) -> None:
        with self._lock:
            use = self._callers[caller]
            use.add(-1, body_bytes)
            if not use.requests:
                del self._callers[caller]
