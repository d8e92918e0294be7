"""Connectivity of clients, from their last contact and from the proxies that answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from fedvit.ports import ProxyReport
from fedvit.types import ClientKind, LastContact

# Below this share of connected clients, a network partition is suspected.
PARTITION_BELOW = 0.5


@dataclass(frozen=True, slots=True)
class Connection:
    """Whether a client is connected; None where that is not known.

    ``reason`` is one word for programs, ``message`` a sentence. ``since`` is when the state began, where that is known;
    ``until`` when it ends without another contact.
    """

    connected: bool | None
    reason: str
    message: str
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Connectivity:
    """Connectivity of the whole fleet. ``by_kind`` has the total and the connected clients."""

    total: int
    connected: int
    by_kind: Mapping[ClientKind, tuple[int, int]]
    lost: tuple[tuple[LastContact, Connection], ...]

    @property
    def ratio(self) -> float:
        """The share of connected clients; 1 for an empty fleet."""
        return self.connected / self.total if self.total else 1.0

    @property
    def partition_suspected(self) -> bool:
        """Whether so many clients are disconnected that the network is the likely cause."""
        return self.ratio < PARTITION_BELOW

    def with_hosted(self, count: int) -> Connectivity:
        """The same with ``count`` more virtual clients, all connected."""
        total, there = self.by_kind.get(ClientKind.VIRTUAL, (0, 0))
        counts = {**self.by_kind, ClientKind.VIRTUAL: (total + count, there + count)}
        by_kind = {kind: counts[kind] for kind in ClientKind if kind in counts and counts[kind][0]}
        return replace(self, total=self.total + count, connected=self.connected + count, by_kind=by_kind)


def connectivity(
    last_contacts: Iterable[LastContact], proxies: ProxyReport | None, now: datetime, timeout_s: float
) -> Connectivity:
    """Judge every client; see :func:`connection_of`."""
    judged = [(contact, connection_of(contact, proxies, now, timeout_s)) for contact in last_contacts]
    total = Counter(contact.kind for contact, _ in judged)
    there = Counter(contact.kind for contact, connection in judged if connection.connected)
    return Connectivity(
        total=len(judged),
        connected=there.total(),
        by_kind={kind: (total[kind], there[kind]) for kind in ClientKind if total[kind]},
        lost=tuple((contact, connection) for contact, connection in judged if not connection.connected),
    )


def connection_of(contact: LastContact, proxies: ProxyReport | None, now: datetime, timeout_s: float) -> Connection:
    """A virtual client is connected while the proxy that hosts it answers, any other while it is heard.

    Args:
        proxies: which proxies answer; None where the aggregator, who asks them, does not answer itself.
        timeout_s: how old the last sign of life may be.
    """
    if contact.kind is ClientKind.VIRTUAL:
        if proxies is None:
            return Connection(None, "AggregatorSilent", "The aggregator does not say which client proxies answer.")
        if proxies.reaches(contact.client_id):
            return Connection(True, "ProxyAnswers", "A client proxy that can host it answers.")
        return Connection(False, "ProxySilent", "The client proxy that hosts it does not answer.")
    if contact.last_seen_at is None:
        return Connection(False, "NeverSeen", "It was never heard.")
    until = contact.last_seen_at + timedelta(seconds=timeout_s)
    if now <= until:
        return Connection(True, "HeartbeatFresh", f"It was heard within {timeout_s:g} s.", until=until)
    return Connection(False, "HeartbeatMissing", f"It was not heard for more than {timeout_s:g} s.", since=until)
