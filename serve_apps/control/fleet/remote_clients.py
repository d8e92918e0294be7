"""Routes of remote clients: task, weights, update, histogram. See :mod:`fedvit.rounds.remote`."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from fedvit.access.identity import Identity, Scope
from fedvit.api.base import MAX_INTEGER
from fedvit.api.clients import (
    HistogramBody,
    HistogramReceipt,
    HistogramRequestView,
    PhaseReceiptView,
    PhaseRequestView,
    ReceiptView,
    RemoteTaskView,
    SecurePhase,
    SecureSessionView,
    TaskView,
)
from fedvit.errors import NotFoundError
from fedvit.rounds.remote import FROZEN_DIGEST, Offer, RemoteWork
from fedvit.rounds.remote_sessions import PhaseRequest, RemoteSessions
from fedvit.secure_session import MASK
from fedvit.types import DIGEST, Encoding
from fedvit.wire.histograms import MAX_CELLS, HistogramRequest
from serve_apps.control.fleet.heartbeats import Heartbeats
from serve_apps.control.http.access import CurrentIdentity, requires
from serve_apps.control.http.route import OCTETS, route, takes_bytes, takes_json
from serve_apps.control.services import Services

_DEVICE = [requires(Scope.DEVICE, Scope.OPERATOR)]
# What becomes of an update stands in the round's outcomes and in the version's lineage, not in the audit trail.
_UPLOADER = [requires(Scope.DEVICE, Scope.OPERATOR, audited=False)]


# A count has at most nine characters.
MAX_HISTOGRAM_BYTES = 16 * MAX_CELLS
SESSION_INTERVAL_S = 1.0
"""A client in a session asks again after so many seconds at most."""
SessionId = Annotated[str, Path(pattern=DIGEST)]
RoundIndex = Annotated[int, Path(ge=1, le=MAX_INTEGER)]
_ROUND_INDEX = TypeAdapter(Annotated[int, Field(ge=1, le=MAX_INTEGER)])


def add_remote_client_routes(api: FastAPI, services: Services, heartbeats: Heartbeats) -> None:
    """Add the routes of remote clients."""
    work, sessions = RemoteWork(services.settings, services.store), RemoteSessions(services.store)
    _add_tasks(api, services, heartbeats, work, sessions)
    _add_uploads(api, services, work)
    _add_phases(api, sessions, services.settings.training.validation.max_update_bytes)
    _add_histograms(api, work)


def _add_tasks(
    api: FastAPI, services: Services, heartbeats: Heartbeats, work: RemoteWork, sessions: RemoteSessions
) -> None:
    store, fleet = services.store, services.settings.fleet

    @route(api, "GET /api/clients/{client_id}/task", "clients", _DEVICE, 404)
    def task(client_id: str, who: CurrentIdentity) -> RemoteTaskView:
        """What a remote client shall train now. To ask is to show that one is there."""
        who.check_speaks_for(client_id)
        heartbeats.learn(client_id)
        heartbeats.beat(client_id)
        offer, wanted, left = work.task(client_id), work.histogram_request(client_id), sessions.request(client_id)
        # The phases of a session follow one another quickly.
        poll_after_s = fleet.task_interval_s if left is None else min(fleet.task_interval_s, SESSION_INTERVAL_S)
        return RemoteTaskView(
            client_id=client_id,
            poll_after_s=poll_after_s,
            task=None if offer is None else _task_view(services, offer),
            histogram=None if wanted is None else _histogram_view(client_id, *wanted),
            secure=None if left is None else _session_view(services, left, answered=sessions.has_answered(left)),
        )

    @route(
        api,
        "GET /api/clients/{client_id}/task/weights",
        "clients",
        _DEVICE,
        404,
        502,
        media_type=OCTETS,
    )
    def weights(client_id: str, who: CurrentIdentity) -> Response:
        """What the client's task starts from, as safetensors; its SHA-256 is the task's ``base_digest``."""
        who.check_speaks_for(client_id)
        offer, left = work.task(client_id), sessions.request(client_id)
        task = left.task if left is not None and left.phase == MASK else None if offer is None else offer.task
        if task is None:
            raise NotFoundError(f"There is no task for {client_id!r}.", cure="Ask for one, and fetch its weights then.")
        return Response(store.blobs.get(task.base_digest), media_type=OCTETS)


def _add_uploads(api: FastAPI, services: Services, work: RemoteWork) -> None:
    place = "/api/clients/{client_id}/updates/{run_id}/{round_index}"
    limit = services.settings.training.validation.max_update_bytes

    def check(who: Identity, path: Mapping[str, str]) -> int:
        who.check_speaks_for(path["client_id"])
        return work.check_awaited(path["client_id"], path["run_id"], _round_index(path["round_index"]))

    @route(
        api,
        f"PUT {place}",
        "clients",
        _UPLOADER,
        404,
        responses={200: {"model": ReceiptView}},
        status_code=202,
        openapi_extra=takes_bytes(limit, before_body=check),
    )
    async def upload(
        client_id: str, run_id: str, round_index: RoundIndex, request: Request, response: Response
    ) -> ReceiptView:
        """Bring what a client learned in a round, as its trainer writes it.

        A client has one answer to a round. It is repeated without harm: 202 while it waits for the round, 200 once the
        round has taken it. One that validation rejects is refused with its reason (422) and counts towards the
        client's quarantine; for one that nobody waits for, or that differs from the first, 409 says what happened.
        """
        content = await request.body()
        receipt = await run_in_threadpool(work.receive, client_id, run_id, round_index, content)
        receipt.check()
        if receipt.folded_in is not None:
            response.status_code = 200
        return ReceiptView.of(receipt)

    @route(api, f"GET {place}", "clients", _DEVICE, 404)
    def receipt(client_id: str, run_id: str, round_index: RoundIndex, who: CurrentIdentity) -> ReceiptView:
        """What became of a client's update to a round."""
        who.check_speaks_for(client_id)
        return ReceiptView.of(work.receipt(client_id, run_id, round_index))


def _add_phases(api: FastAPI, sessions: RemoteSessions, max_bytes: int) -> None:
    def check(who: Identity, path: Mapping[str, str]) -> int:
        who.check_speaks_for(path["client_id"])
        return sessions.check_awaited(path["client_id"], path["session"], path["phase"])

    @route(
        api,
        "PUT /api/clients/{client_id}/sessions/{session}/{phase}",
        "clients",
        _UPLOADER,
        404,
        status_code=202,
        openapi_extra=takes_bytes(max_bytes, before_body=check),
    )
    async def answer(client_id: str, session: SessionId, phase: SecurePhase, request: Request) -> PhaseReceiptView:
        """Bring a client's answer to one phase of its secure aggregation session.

        A client has one answer to a phase, the first; to repeat it does no harm. Another one, and one that nobody waits
        for, is answered 409; a masked vector of another length or ring, 422.
        """
        content = await request.body()
        receipt = await run_in_threadpool(sessions.receive, client_id, session, phase, content)
        receipt.check()
        return PhaseReceiptView.of(receipt)


def _add_histograms(api: FastAPI, work: RemoteWork) -> None:
    place = "PUT /api/clients/{client_id}/histograms/{run_id}/{round_index}"

    @route(api, place, "clients", _UPLOADER, 404, openapi_extra=takes_json(MAX_HISTOGRAM_BYTES))
    def histogram(
        client_id: str, run_id: str, round_index: RoundIndex, body: HistogramBody, who: CurrentIdentity
    ) -> HistogramReceipt:
        """Bring what a client tells of its data: counts that it has noised. One that nobody waits for is not kept."""
        who.check_speaks_for(client_id)
        kept = work.receive_histogram(client_id, run_id, round_index, body.counts)
        return HistogramReceipt(client_id=client_id, run_id=run_id, round_index=round_index, kept=kept)


def _round_index(text: str) -> int:
    try:
        return _ROUND_INDEX.validate_python(text)
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("path", "round_index")} for fault in error.errors()]) from None


def _histogram_view(client_id: str, order: HistogramRequest, num_examples: int) -> HistogramRequestView:
    output_id = order.output_id(client_id, num_examples)
    return HistogramRequestView(num_examples=num_examples, output_id=output_id, order=order.to_json())


def _session_view(services: Services, left: PhaseRequest, *, answered: bool) -> SecureSessionView:
    if answered:
        return SecureSessionView(session=left.session.session, phase=left.phase, asked=None)
    offer = Offer(left.client_id, left.task, left.num_examples, Encoding.FLOAT32)
    asked = PhaseRequestView(
        request=base64.b64encode(left.request).decode(),
        parameters=left.session.parameters,
        identities=left.session.identities,
        task=_task_view(services, offer),
    )
    return SecureSessionView(session=left.session.session, phase=left.phase, asked=asked)


def _task_view(services: Services, offer: Offer) -> TaskView:
    settings, fleet = services.settings, services.store.metadata.fleet()
    return TaskView.of(
        offer.task,
        num_examples=offer.num_examples,
        output_id=offer.output_id,
        encoding=offer.encoding.value,
        frozen_digest=str(services.store.metadata.get(FROZEN_DIGEST)),
        image_size=settings.data.image_size,
        classes=fleet.classes if fleet else (),
        settings=settings.training_identity(),
    )
