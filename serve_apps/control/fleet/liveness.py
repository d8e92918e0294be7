"""Liveness of clients, from heartbeats at this replica, the store, and the client proxies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta

from fedvit.api.clients import ClientView
from fedvit.cohort.conditions import client_conditions
from fedvit.cohort.connectivity import Connection, Connectivity, connection_of, connectivity
from fedvit.ports import ProxyReport
from fedvit.store.records import ClientValidation
from fedvit.types import Client, ClientKind, LastContact
from serve_apps.control.fleet.heartbeats import Heartbeats
from serve_apps.control.services import Services

# How old an answer of the proxies may be where a whole page of clients is shown.
PROXIES_KNOWN = timedelta(seconds=5)
_LOG = logging.getLogger("fedvit.control")


class Liveness:
    """Whether clients are connected, one by one or all at once."""

    def __init__(self, services: Services, heartbeats: Heartbeats) -> None:
        self._services, self._heartbeats, self._now = services, heartbeats, services.clock.now
        self._timeout_s = services.settings.fleet.heartbeat_timeout_s
        self._lock = threading.Lock()
        self._proxies: tuple[datetime, ProxyReport | None] | None = None

    def connectivity(self) -> Connectivity:
        """The active clients, all of them, with the proxies asked now."""
        proxies, _ = self._known_proxies(timedelta(0))
        store = self._services.store
        # Of virtual clients there may be a million: looked at one by one only when one of them may be lost.
        counted = proxies is not None and proxies.reaches_all
        last_contacts = [
            self._newest_contact(contact) for contact in store.clients.last_contacts(include_virtual=not counted)
        ]
        result = connectivity(last_contacts, proxies, self._now(), self._timeout_s)
        return result.with_hosted(store.clients.count_virtual()) if counted else result

    def active_clients(self) -> list[Client]:
        """The active clients, with the last contact of each."""
        return [self._newest(client) for client in self._services.store.clients.all(active=True)]

    def view(self, client: Client) -> ClientView:
        """One client."""
        validations = self._services.store.clients.validations([client.client_id])
        return self.shown(client, validations.get(client.client_id))

    def shown(self, client: Client, verdict: ClientValidation | None) -> ClientView:
        """One client whose validation is read already."""
        client = self._newest(client)
        conditions = client_conditions(client, self._connection(client.last_contact), verdict)
        return ClientView.of(client, conditions=conditions)

    def good_until(self, clients: Iterable[Client]) -> datetime | None:
        """When, with nothing written meanwhile, the first of these clients may appear differently."""
        moments = []
        for client in clients:
            if client.kind is ClientKind.VIRTUAL:
                moments.append(self._known_proxies(PROXIES_KNOWN)[1])
            else:
                until = self._connection(self._newest_contact(client.last_contact)).until
                moments += [until] if until else []
        return min(moments, default=None)

    def _connection(self, contact: LastContact) -> Connection:
        virtual = contact.kind is ClientKind.VIRTUAL
        proxies = self._known_proxies(PROXIES_KNOWN)[0] if virtual else None
        return connection_of(contact, proxies, self._now(), self._timeout_s)

    def _newest(self, client: Client) -> Client:
        return replace(client, last_seen_at=self._newest_contact(client.last_contact).last_seen_at)

    def _newest_contact(self, contact: LastContact) -> LastContact:
        return replace(contact, last_seen_at=self._heartbeats.last_seen(contact.client_id, contact.last_seen_at))

    def _known_proxies(self, age: timedelta) -> tuple[ProxyReport | None, datetime]:
        """What the proxies answered, at most ``age`` ago, and until when that is taken for the truth."""
        with self._lock:
            if self._proxies is None or self._now() - self._proxies[0] >= age:
                report = self._asked_proxies()
                self._proxies = self._now(), report
            at, report = self._proxies
            return report, at + PROXIES_KNOWN

    def _asked_proxies(self) -> ProxyReport | None:
        try:
            return self._services.aggregator().proxies_alive()
        except Exception as error:  # It may be dead or restarting; the fleet is shown all the same.
            _LOG.warning("The aggregator does not say which proxies answer: %s", error)
            return None
