"""Routes of remote clients: task, weights, update, histogram. See :mod:`fedvit.rounds.remote`."""

from __future__ import annotations

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
    ReceiptView,
    RemoteTaskView,
    TaskView,
)
from fedvit.errors import NotFoundError
from fedvit.rounds.remote import FROZEN_DIGEST, Offer, RemoteWork
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
RoundIndex = Annotated[int, Path(ge=1, le=MAX_INTEGER)]
_ROUND_INDEX = TypeAdapter(Annotated[int, Field(ge=1, le=MAX_INTEGER)])


def add_remote_client_routes(api: FastAPI, services: Services, heartbeats: Heartbeats) -> None:
    """Add the routes of remote clients."""
    work = RemoteWork(services.settings, services.store)
    _add_tasks(api, services, heartbeats, work)
    _add_uploads(api, services, work)
    _add_histograms(api, work)


def _add_tasks(api: FastAPI, services: Services, heartbeats: Heartbeats, work: RemoteWork) -> None:
    store, fleet = services.store, services.settings.fleet

    @route(api, "GET /api/clients/{client_id}/task", "clients", _DEVICE, 404)
    def task(client_id: str, who: CurrentIdentity) -> RemoteTaskView:
        """What a remote client shall train now. To ask is to show that one is there."""
        who.check_speaks_for(client_id)
        heartbeats.learn(client_id)
        heartbeats.beat(client_id)
        offer, wanted = work.task(client_id), work.histogram_request(client_id)
        return RemoteTaskView(
            client_id=client_id,
            poll_after_s=fleet.task_interval_s,
            task=None if offer is None else _task_view(services, offer),
            histogram=None if wanted is None else _histogram_view(client_id, *wanted),
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
        offer = work.task(client_id)
        if offer is None:
            raise NotFoundError(f"There is no task for {client_id!r}.", cure="Ask for one, and fetch its weights then.")
        return Response(store.blobs.get(offer.task.base_digest), media_type=OCTETS)


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
