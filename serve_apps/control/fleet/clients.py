"""Routes of the fleet: membership, connectivity, decisions of an operator on a client, and the backup channel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Response
from starlette.concurrency import run_in_threadpool

from fedvit.access.identity import Scope
from fedvit.api.clients import (
    BackupView,
    ChannelView,
    ClientsStatus,
    ClientView,
    ConnectivityView,
    KindView,
    LostClientView,
    RegisterClient,
    ReinstateRequest,
    ValidateRequest,
)
from fedvit.errors import FedvitError, NotFoundError, RateLimitedError
from fedvit.operations.mailbox import Mailbox, MailboxState
from fedvit.rounds.remote import RemoteWork
from fedvit.rounds.remote_sessions import RemoteSessions
from fedvit.store.records import ClientValidation, RegistrationQuota
from fedvit.types import Client, ClientKind
from serve_apps.control.fleet.heartbeats import Heartbeats
from serve_apps.control.fleet.liveness import Liveness
from serve_apps.control.http.access import OPERATOR, VIEWER, AuditNote, CurrentIdentity, Note, requires
from serve_apps.control.http.pages import Page, Pages
from serve_apps.control.http.route import Limit, RowOffset, route, takes_json
from serve_apps.control.services import Services

MAX_REGISTRATION_BYTES = 128 * 1024


def add_client_routes(
    api: FastAPI, services: Services, heartbeats: Heartbeats, liveness: Liveness, mailbox: Mailbox
) -> None:
    """Add the routes that list, register, remove and judge clients."""
    _add_readings(api, services, heartbeats, liveness, mailbox)
    _add_changes(api, services, liveness)


def _add_readings(
    api: FastAPI, services: Services, heartbeats: Heartbeats, liveness: Liveness, mailbox: Mailbox
) -> None:
    store = services.store
    pages = Pages(lambda: (store.change_counter(), heartbeats.arrivals), services.clock.now)

    def page_of(offset: int, limit: int) -> Page:
        page = store.clients.page(offset, limit)
        good_until = liveness.good_until(page.clients)
        view = ClientsStatus(
            total=page.total,
            active=page.active,
            validated=page.validated,
            clients=tuple(liveness.shown(client, page.validations.get(client.client_id)) for client in page.clients),
        )
        return Page(view.model_dump_json().encode(), good_until)

    @route(api, "GET /api/clients/status", "clients", VIEWER, response_model=ClientsStatus)
    async def status(limit: Limit = 100, offset: RowOffset = 0) -> Response:
        """A page of clients and the totals; ``last_seen_at`` may be a second old."""
        body = pages.find((offset, limit))
        if body is None:
            body = await run_in_threadpool(pages.render, (offset, limit), lambda: page_of(offset, limit))
        return Response(body, media_type="application/json")

    @route(api, "GET /api/clients/connectivity", "clients", VIEWER)
    def connectivity(limit: Limit = 100, offset: RowOffset = 0) -> ConnectivityView:
        """Which active clients are connected: virtual ones while their proxy answers, others while they are heard."""
        fleet = liveness.connectivity()
        return ConnectivityView(
            total=fleet.total,
            connected=fleet.connected,
            disconnected=fleet.total - fleet.connected,
            ratio=fleet.ratio,
            partition_suspected=fleet.partition_suspected,
            heartbeat_timeout_s=services.settings.fleet.heartbeat_timeout_s,
            backup_channel=_channel(mailbox),
            by_kind={kind: KindView(total=all_, connected=here) for kind, (all_, here) in fleet.by_kind.items()},
            disconnected_clients=tuple(
                LostClientView.of(contact, reason=connection.message)
                for contact, connection in fleet.lost[offset : offset + limit]
            ),
        )


def _add_changes(api: FastAPI, services: Services, liveness: Liveness) -> None:
    store, fleet = services.store, services.settings.fleet

    def changed(client: Client, note: AuditNote) -> ClientView:
        note.after = _facts(client)
        return liveness.view(client)

    @route(
        api,
        "POST /api/clients/register",
        "clients",
        [requires(Scope.OPERATOR, Scope.DEVICE)],
        status_code=201,
        openapi_extra=takes_json(MAX_REGISTRATION_BYTES),
    )
    def register(request: RegisterClient, note: Note, who: CurrentIdentity) -> ClientView:
        """Add a vehicle, or bring one back; registering twice is harmless.

        A vehicle that an operator registers is admitted with its number of examples. One that registers itself waits
        until an operator validates it, unless ``fleet.admission`` is ``automatic``.
        """
        who.check_speaks_for(request.device_id)
        by_operator = who.may([Scope.OPERATOR])
        known: Client | None = None
        with contextlib.suppress(NotFoundError):
            known = store.clients.get(request.device_id)
        kind = ClientKind(request.kind)
        vehicle = Client(request.device_id, kind, request.num_examples, capabilities=request.capabilities)
        try:
            client, changes = store.clients.enrol(
                vehicle,
                admitted=by_operator or fleet.admission == "automatic",
                quota=None if by_operator else RegistrationQuota(fleet.max_clients, fleet.registrations_per_day),
            )
        except RateLimitedError:
            # A vehicle that is refused all day must not fill the audit trail.
            note.audited = False
            raise
        # A vehicle registers whenever it starts, mostly as before.
        note.before, note.audited = _facts(known) if known else None, changes or by_operator
        return changed(client, note)

    @route(api, "DELETE /api/clients/{client_id}", "clients", OPERATOR, 404)
    def remove(client_id: str, note: Note) -> ClientView:
        """Remove a client with its task and its stored update; its record and its privacy spend remain."""
        note.before = _facts(store.clients.get(client_id))
        removed = store.clients.update(client_id, active=False)
        RemoteWork(services.settings, store).forget(client_id)
        RemoteSessions(store).forget(client_id)
        return changed(removed, note)

    # Behind the lists: their paths would be taken for a client's.
    @route(api, "GET /api/clients/{client_id}", "clients", VIEWER, 404)
    def client(client_id: str) -> ClientView:
        """One client, and what holds of it."""
        return liveness.view(store.clients.get(client_id))

    @route(api, "POST /api/clients/{client_id}/reinstate", "clients", OPERATOR, 404)
    def reinstate(client_id: str, request: ReinstateRequest, note: Note) -> ClientView:
        """Lift a client's quarantine; harmless where there is none. The justification stands in the audit trail."""
        note.before = _facts(store.clients.get(client_id))
        return changed(store.clients.reinstate(client_id), note)

    @route(api, "POST /api/clients/{client_id}/validate", "clients", OPERATOR, 404)
    def validate(client_id: str, request: ValidateRequest, note: Note) -> ClientView:
        """Record whether a client's data can be trusted; a run with ``validated_only`` draws no others.

        ``validated: true`` also admits a vehicle that registered itself, with at most ``num_examples`` examples.
        """
        note.before = _facts(store.clients.get(client_id))
        now, admitted_examples = services.clock.now(), request.num_examples
        validation = ClientValidation(request.validated, request.reason, now, admitted_examples=admitted_examples)
        return changed(store.clients.validate(client_id, validation), note)


def _channel(mailbox: Mailbox) -> ChannelView:
    """How the second way stands; that it may be broken is no reason to hide the first."""
    enabled, delivered = mailbox.enabled_and_delivered()
    try:
        pending = mailbox.state().pending
    except FedvitError:
        pending = None
    return ChannelView(enabled=enabled, pending=pending, delivered=delivered)


def _facts(client: Client) -> dict[str, Any]:
    return ClientView.of(client, conditions=()).model_dump(mode="json", exclude={"conditions"})


def add_backup_routes(api: FastAPI, mailbox: Mailbox) -> None:
    """Add the routes of the backup channel, a mailbox in blob storage for vehicles that cannot reach this API."""

    def change(to: Callable[[], MailboxState], note: AuditNote) -> BackupView:
        note.before = {"enabled": mailbox.enabled()}
        state = to()
        note.after = {"enabled": state.enabled, "url": state.url}
        return BackupView.of(state)

    @route(api, "POST /api/communication/enable-backup", "communication", OPERATOR, 503)
    def enable(note: Note) -> BackupView:
        """Take the messages that vehicles left in the mailbox, those left before included; harmless when repeated."""
        return change(mailbox.enable, note)

    @route(api, "POST /api/communication/disable-backup", "communication", OPERATOR, 503)
    def disable(note: Note) -> BackupView:
        """Leave messages where they are; harmless when repeated."""
        return change(mailbox.disable, note)

    @route(api, "GET /api/communication/backup", "communication", VIEWER, 422, 503)
    def backup() -> BackupView:
        """How the channel stands."""
        return BackupView.of(mailbox.state())
