"""Heartbeats of vehicles. They are telemetry: not audited, and not written to the store one by one."""

from __future__ import annotations

from datetime import datetime, timedelta

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from fedvit.access.identity import Identity, Scope
from fedvit.api.clients import HeartbeatRequest, HeartbeatView, MailboxAccess
from fedvit.clock import SYSTEM_CLOCK
from fedvit.config import FleetConfig
from fedvit.metrics.exposition import counter
from fedvit.operations.mailbox import Mailbox
from fedvit.ports import ClockPort
from fedvit.store.store import Store
from serve_apps.control.http.access import CurrentIdentity, requires
from serve_apps.control.http.route import route, takes_json
from serve_apps.control.http.write_behind import WriteBehind
from serve_apps.control.services import Services

MAX_BODY_BYTES = 4 * 1024
# One a process, however many applications it builds.
_COUNTED = counter("heartbeats_total")


class Heartbeats:
    """The newest heartbeat of each client at this replica; about once a second they are written to the store.

    Only registered clients are kept, which bounds the memory. A client stays registered for ever, removed or not, and
    is looked up once.

    Attributes:
        seen: the buffer in front of the store.
        arrivals: grows whenever a client appears that was not connected, as far as this replica knew.
    """

    def __init__(self, store: Store, config: FleetConfig, clock: ClockPort = SYSTEM_CLOCK) -> None:
        self._store, self._clock = store, clock
        self._timeout = timedelta(seconds=config.heartbeat_timeout_s)
        self._last: dict[str, datetime | None] = {}
        self.seen = WriteBehind(store.clients.set_last_seen)
        self.arrivals = 0

    def knows(self, client_id: str) -> bool:
        """Whether the client is known to be registered, without asking the store."""
        return client_id in self._last

    def learn(self, client_id: str) -> None:
        """Look the client up.

        Raises:
            NotFoundError: no such client.
        """
        self._last.setdefault(client_id, self._store.clients.get(client_id).last_seen_at)

    def beat(self, client_id: str) -> datetime:
        """A known client is there now; return the moment."""
        at, last = self._clock.now(), self._last[client_id]
        self._last[client_id] = at
        self.arrivals += last is None or at - last > self._timeout
        self.seen.put(client_id, at)
        return at

    def last_seen(self, client_id: str, stored: datetime | None) -> datetime | None:
        """The newest sign of life: the one in the store, or one on its way there."""
        here = self._last.get(client_id)
        return max((at for at in (here, stored) if at is not None), default=None)


class _Channel:
    """Whether the backup channel is open; the store is asked only after something was written."""

    def __init__(self, store: Store, mailbox: Mailbox) -> None:
        self._store, self._mailbox = store, mailbox
        self._known: tuple[int, bool] | None = None

    async def is_open(self) -> bool:
        counter = self._store.change_counter()
        if self._known is None or self._known[0] != counter:
            self._known = counter, await run_in_threadpool(self._mailbox.enabled)
        return self._known[1]

    def access(self, who: Identity, client_id: str) -> MailboxAccess | None:
        if who.client_id != client_id:
            return None
        return MailboxAccess(url=self._mailbox.url, key=self._mailbox.key_of(client_id).hex())


def add_heartbeat_routes(api: FastAPI, services: Services, heartbeats: Heartbeats, mailbox: Mailbox) -> None:
    """Add the route that receives heartbeats."""
    interval_s = services.settings.fleet.heartbeat_interval_s
    channel = _Channel(services.store, mailbox)

    @route(
        api,
        "POST /api/clients/{client_id}/heartbeat",
        "clients",
        [requires(Scope.DEVICE, Scope.OPERATOR, audited=False)],
        404,
        openapi_extra=takes_json(MAX_BODY_BYTES),
    )
    async def heartbeat(client_id: str, request: HeartbeatRequest, who: CurrentIdentity) -> HeartbeatView:
        """A vehicle is there; a token that is bound to a client speaks for that one only."""
        who.check_speaks_for(client_id)
        if not heartbeats.knows(client_id):
            await run_in_threadpool(heartbeats.learn, client_id)
        _COUNTED.labels(request.status).inc()
        return HeartbeatView(
            client_id=client_id,
            received_at=heartbeats.beat(client_id),
            interval_s=interval_s,
            backup_channel=await channel.is_open(),
            mailbox=channel.access(who, client_id),
        )
