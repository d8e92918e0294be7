"""The client of the control API: one connection, and the routes in groups."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import httpx

from fedvit.client.caller import TIMEOUT_S, Caller
from fedvit.client.fleet import Clients, Communication, Monitoring
from fedvit.client.privacy import Emergency, Incidents, Privacy
from fedvit.client.system import Audit, System
from fedvit.client.training import Aggregation, Model, Operations, Training
from fedvit.clock import SYSTEM_CLOCK
from fedvit.ports import ClockPort


class FedvitClient:
    """A typed client of one control API.

    Every call raises the :mod:`fedvit.errors` class that the server's problem document names, ``ControlApiError`` where
    there is none, and ``ControlUnreachableError`` when nothing answers. Changes take an ``idempotency_key`` and get one
    of their own otherwise, so that a lost connection is tried again without acting twice.

    Args:
        base_url: ``http://HOST:PORT`` of the control API.
        token: a bearer token of ``fedvit token create``.
        timeout_s: the longest silence on the line before a request is given up.
        verify: a file of certificates to trust, PEM, instead of the machine's; False trusts any server.
        transport: replaces the network, for tests.
        sleep: pauses between attempts, and between polls of an operation.
        clock: measures how long an operation is awaited.
        before_change: called with every changing request before it is sent; what it raises reaches the caller.

    Raises:
        UsageError: ``base_url`` is no http(s) URL, ``token`` no token, or ``verify`` names no certificates.
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        verify: Path | bool = True,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: ClockPort = SYSTEM_CLOCK,
        before_change: Callable[[httpx.Request], None] | None = None,
    ) -> None:
        self._caller = Caller(
            base_url,
            token=token,
            timeout_s=timeout_s,
            verify=verify,
            transport=transport,
            sleep=sleep,
            clock=clock,
            before_change=before_change,
        )
        self.clients = Clients(self._caller)
        self.training = Training(self._caller)
        self.model = Model(self._caller)
        self.privacy = Privacy(self._caller)
        self.aggregation = Aggregation(self._caller)
        self.communication = Communication(self._caller)
        self.monitoring = Monitoring(self._caller)
        self.emergency = Emergency(self._caller)
        self.incidents = Incidents(self._caller)
        self.operations = Operations(self._caller)
        self.audit = Audit(self._caller)
        self.system = System(self._caller)

    @property
    def base_url(self) -> str:
        """Where the control API is."""
        return self._caller.base_url

    def close(self) -> None:
        """Give connections back."""
        self._caller.close()

    def __enter__(self) -> FedvitClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
