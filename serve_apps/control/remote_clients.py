"""Remote clients: they ask for a task, fetch its weights, and upload what they learned. See fedvit.rounds.remote."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from pydantic import BaseModel, BeforeValidator, Field
from starlette.concurrency import run_in_threadpool

from fedvit.access.identity import Scope
from fedvit.errors import ConflictError, NotFoundError, UpdateRejectedError
from fedvit.rounds.remote import FROZEN_DIGEST, Offer, Receipt, ReceiptStatus, RemoteWork
from fedvit.wire.histograms import CELL_LIMIT, MAX_CELLS, HistogramRequest
from serve_apps.control.access import CurrentIdentity, requires
from serve_apps.control.heartbeats import Heartbeats
from serve_apps.control.route import takes_bytes
from serve_apps.control.schemas import MAX_INTEGER, RequestBody
from serve_apps.control.services import Services
from serve_apps.problems import documented

_DEVICE = [requires(Scope.DEVICE, Scope.OPERATOR)]
# What becomes of an update stands in the round's outcomes and in the version's lineage, not in the audit trail.
_UPLOADER = [requires(Scope.DEVICE, Scope.OPERATOR, audited=False)]


def _whole(given: object) -> object:
    # 3.0 is an integer in JSON, and "3" is none.
    if isinstance(given, bool | str):
        raise ValueError("is no whole number")
    return given


Count = Annotated[int, Field(ge=-CELL_LIMIT, le=CELL_LIMIT), BeforeValidator(_whole)]
RoundIndex = Annotated[int, Path(ge=1, le=MAX_INTEGER)]


class TaskView(BaseModel):
    """What the client shall do, and all that identifies what it will release.

    The ledger holds the charge of ``output_id``, which is for ``num_examples`` records: a client that holds another
    number of them must not release anything, and registers again. ``encoding`` is the form to send, ``frozen_digest``
    the SHA-256 of the weights that never travel. ``settings`` has model, training and privacy of the run.
    """

    run_id: str
    round_index: int
    base_digest: str
    data_digest: str
    noise_multiplier: float
    sampling_prob: float
    l2_clip_norm: float
    local_steps: int
    learning_rate: float
    privacy_unit: str
    num_examples: int
    output_id: str
    encoding: str
    frozen_digest: str
    image_size: int
    classes: list[str]
    settings: dict[str, Any]


class HistogramRequestView(BaseModel):
    """What the client shall count of its records, see docs/drift.md; the ledger holds the charge of ``output_id``."""

    num_examples: int
    output_id: str
    order: dict[str, Any]


class RemoteTaskView(BaseModel):
    """The client's task and histogram, if there are any; the client asks again after ``poll_after_s``."""

    client_id: str
    poll_after_s: float
    task: TaskView | None
    histogram: HistogramRequestView | None


class HistogramBody(RequestBody):
    """Noised counts, as many as were asked for, in the order of the histograms."""

    counts: Annotated[list[Count], Field(max_length=MAX_CELLS)]


class HistogramReceipt(BaseModel):
    """Whether the histogram was waited for, and is kept."""

    client_id: str
    run_id: str
    round_index: int
    kept: bool


class ReceiptView(BaseModel):
    """What became of an update; ``reason`` says why it does not count. ``folded_in`` is the round that took it."""

    client_id: str
    run_id: str
    round_index: int
    status: ReceiptStatus
    reason: str | None
    folded_in: int | None
    version: str | None


def add_remote_client_routes(api: FastAPI, services: Services, heartbeats: Heartbeats) -> None:
    """Let remote clients take part."""
    work = RemoteWork(services.settings, services.store)
    _add_tasks(api, services, heartbeats, work)
    _add_uploads(api, services, work)
    _add_sketches(api, work)


def _add_tasks(api: FastAPI, services: Services, heartbeats: Heartbeats, work: RemoteWork) -> None:
    store, fleet = services.store, services.settings.fleet

    @api.get("/api/clients/{client_id}/task", tags=["clients"], dependencies=_DEVICE, responses=documented(404))
    def task(client_id: str, who: CurrentIdentity) -> RemoteTaskView:
        """What a remote client shall train now. To ask is to show that one is there."""
        who.check_speaks_for(client_id)
        heartbeats.learn(client_id)
        heartbeats.beat(client_id)
        offer = work.task(client_id)
        told = None if offer is None else _task_view(services, offer)
        wanted = work.sketch_order(client_id)
        return RemoteTaskView(
            client_id=client_id,
            poll_after_s=fleet.task_interval_s,
            task=told,
            histogram=None if wanted is None else _sketch_view(client_id, *wanted),
        )

    @api.get(
        "/api/clients/{client_id}/task/weights",
        tags=["clients"],
        response_class=Response,
        dependencies=_DEVICE,
        responses=documented(404, 502)
        | {200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}},
    )
    def weights(client_id: str, who: CurrentIdentity) -> Response:
        """What the client's task starts from, as safetensors; its SHA-256 is the task's ``base_digest``."""
        who.check_speaks_for(client_id)
        offer = work.task(client_id)
        if offer is None:
            raise NotFoundError(f"There is no task for {client_id!r}.", cure="Ask for one, and fetch its weights then.")
        return Response(store.blobs.get(offer.task.base_digest), media_type="application/octet-stream")


def _add_uploads(api: FastAPI, services: Services, work: RemoteWork) -> None:
    place = "/api/clients/{client_id}/updates/{run_id}/{round_index}"

    @api.put(
        place,
        tags=["clients"],
        status_code=202,
        dependencies=_UPLOADER,
        responses=documented(404) | {200: {"model": ReceiptView}},
        openapi_extra=takes_bytes(services.settings.training.validation.max_update_bytes),
    )
    async def upload(
        client_id: str, run_id: str, round_index: RoundIndex, request: Request, response: Response, who: CurrentIdentity
    ) -> ReceiptView:
        """Bring what a client learned in a round, as its trainer writes it.

        A client has one answer to a round. It is repeated without harm: 202 while it waits for the round, 200 once the
        round has taken it. One that validation rejects is refused with its reason (422) and counts towards the
        client's quarantine; for one that nobody waits for, or that differs from the first, 409 says what happened.
        """
        who.check_speaks_for(client_id)
        content = await request.body()
        receipt = await run_in_threadpool(work.receive, client_id, run_id, round_index, content)
        _check(receipt)
        if receipt.folded_in is not None:
            response.status_code = 200
        return _receipt_view(receipt)

    @api.get(place, tags=["clients"], dependencies=_DEVICE, responses=documented(404))
    def receipt(client_id: str, run_id: str, round_index: RoundIndex, who: CurrentIdentity) -> ReceiptView:
        """What became of a client's update to a round."""
        who.check_speaks_for(client_id)
        return _receipt_view(work.receipt(client_id, run_id, round_index))


def _add_sketches(api: FastAPI, work: RemoteWork) -> None:
    @api.put(
        "/api/clients/{client_id}/histograms/{run_id}/{round_index}",
        tags=["clients"],
        dependencies=_UPLOADER,
        responses=documented(404),
    )
    def histogram(
        client_id: str, run_id: str, round_index: RoundIndex, body: HistogramBody, who: CurrentIdentity
    ) -> HistogramReceipt:
        """Bring what a client tells of its data: counts that it has noised. One that nobody waits for is not kept."""
        who.check_speaks_for(client_id)
        kept = work.receive_sketch(client_id, run_id, round_index, body.counts)
        return HistogramReceipt(client_id=client_id, run_id=run_id, round_index=round_index, kept=kept)


def _sketch_view(client_id: str, order: HistogramRequest, num_examples: int) -> HistogramRequestView:
    release = order.output_id(client_id, num_examples)
    return HistogramRequestView(num_examples=num_examples, output_id=release, order=order.to_json())


def _check(receipt: Receipt) -> None:
    told = f"The update of {receipt.client_id} to round {receipt.round_index}"
    if receipt.status is ReceiptStatus.REFUSED:
        raise UpdateRejectedError(f"{told} is refused: {receipt.reason}", cure="Do not send it again.")
    if receipt.status in (ReceiptStatus.TURNED_AWAY, ReceiptStatus.DUPLICATE):
        raise ConflictError(f"{told} is not taken: {receipt.reason}.", cure="Ask for the next task.")


def _task_view(services: Services, offer: Offer) -> TaskView:
    settings, fleet = services.settings, services.store.fleet()
    return TaskView(
        **asdict(offer.task),
        num_examples=offer.num_examples,
        output_id=offer.output_id,
        encoding=offer.encoding.value,
        frozen_digest=str(services.store.get_meta(FROZEN_DIGEST)),
        image_size=settings.data.image_size,
        classes=list(fleet.classes) if fleet else [],
        settings=settings.training_identity(),
    )


def _receipt_view(receipt: Receipt) -> ReceiptView:
    return ReceiptView(**asdict(receipt))
