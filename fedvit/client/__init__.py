"""Python client of the control API: one method for each route, frozen values, errors of :mod:`fedvit.errors`.

::

    with FedvitClient("http://127.0.0.1:8000", token=TOKEN) as fedvit:
        release = fedvit.model.rollback("v1.1.3", force=True)
        operation = fedvit.operations.wait(fedvit.model.retrain("fine_tune"))
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import httpx

from fedvit.api.transport import open_http
from fedvit.client.caller import TIMEOUT_S, Caller
from fedvit.client.fleet import Clients, Communication, Monitoring
from fedvit.client.privacy import Emergency, Incidents, Privacy
from fedvit.client.training import Aggregation, Audit, Model, Operations, System, Training
from fedvit.clock import SYSTEM_CLOCK
from fedvit.ports import ClockPort

__all__ = ["FedvitClient"]


class FedvitClient:
    """A typed client of one control API.

    Every call raises the :mod:`fedvit.errors` class that the server's problem document names, ``ControlApiError`` where
    there is none, and ``ControlUnreachableError`` when nothing answers. Changes take an ``idempotency_key`` and get one
    of their own otherwise, so that a lost connection is tried again without acting twice.

    Args:
        base_url: ``http://HOST:PORT`` of the control API.
        token: a bearer token of ``fedvit token create``.
        timeout_s: seconds until a call is given up; large uploads and downloads have more.
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
        http = open_http(base_url, timeout_s=timeout_s, token=token, verify=verify, transport=transport)
        self._caller = Caller(http, base_url.rstrip("/"), timeout_s, sleep, clock, before_change)
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
        self._caller.http.close()

    def __enter__(self) -> FedvitClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
