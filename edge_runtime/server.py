"""HTTP routes of an inference process, on vehicles and in the server's replicas."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge_runtime.access import on_fedvit_error, on_http_error, on_unexpected_error
from edge_runtime.engine import InferenceEngine, Prediction
from edge_runtime.service import ModelService
from edge_runtime.stats import ProcessMeter, RequestStats
from fedvit.api.inbound import BodyLimits, declared_length, read_body
from fedvit.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    CompressedBodyError,
    DataError,
    FedvitError,
    OverloadedError,
)
from fedvit.metrics.exposition import render
from fedvit.registry.client import ReleaseClient
from fedvit.wire.images import MAX_IMAGE_BYTES

# Two, so that one image is decoded while the model runs on another.
WORKERS = 2
MAX_IN_FLIGHT = 64
MAX_BUFFERED_BYTES = 128 * 2**20
BODY_TIMEOUT_S = 30.0
# An image comes from a camera beside the process, so a slow body is no honest one.
LEAST_BODY_BYTES_PER_S = 64 * 1024
BODY_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """Options of one inference process.

    ``metrics_dir`` is the multiprocess folder on a server and None on a vehicle. ``count_answers`` counts the predicted
    classes. It is for servers only: what a vehicle sees stays private.
    """

    device_id: str
    source: str
    poll_interval_s: float = 1.0
    threads: int = 1
    workers: int = WORKERS
    max_in_flight: int = MAX_IN_FLIGHT
    metrics_dir: Path | None = None
    count_answers: bool = False


class ServingProcess:
    """A model service with its routes, metrics (``registry``) and bounded pool of inference threads."""

    def __init__(self, client: ReleaseClient, options: ServingOptions) -> None:
        self.options = options
        self.registry = CollectorRegistry()
        self._stats = RequestStats(self.registry, count_answers=options.count_answers)
        self._meter = ProcessMeter()
        self._cache = client.folder
        self.service = ModelService(client, options.threads, on_swap=self._stats.serves)
        # Separate from the default pool, so that health answers while images wait.
        self._pool = ThreadPoolExecutor(options.workers, thread_name_prefix="infer")
        self._in_flight = self._buffered = 0

    def heartbeat(self) -> dict[str, str | None]:
        """The body of a heartbeat to the control server."""
        engine = self.service.current
        healthy = engine is not None and self.service.last_error is None
        return {"status": "ok" if healthy else "degraded", "model_version": engine.manifest.version if engine else None}

    def app(self, *middleware: Middleware) -> Starlette:
        """The ASGI application. Its lifespan starts and stops the polling."""
        return Starlette(
            routes=[
                Route("/infer", self._infer, methods=["POST"]),
                Route("/health", self._health),
                Route("/health/detailed", self._health_detailed),
                Route("/metrics", self._metrics),
            ],
            middleware=middleware,
            exception_handlers={
                FedvitError: on_fedvit_error,
                HTTPException: on_http_error,
                Exception: on_unexpected_error,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(self.service.start, self.options.poll_interval_s)
        try:
            yield
        finally:
            await asyncio.to_thread(self.service.stop)
            self._pool.shutdown(wait=False)

    async def _infer(self, request: Request) -> Response:
        try:
            sequence, prediction = await self._predict(request)
        except ClientDisconnect:
            self._stats.failed("rejected")
            return Response(status_code=400)
        except FedvitError as error:
            self._stats.failed(_outcome(error))
            raise
        except Exception:
            self._stats.failed("failed")
            raise
        self._stats.succeeded(sequence, prediction.duration_s, prediction.class_index)
        return JSONResponse(dataclasses.asdict(prediction))

    async def _predict(self, request: Request) -> tuple[int, Prediction]:
        """The sequence number of the release that answered, and its prediction."""
        engine = self.service.engine
        self._check_room()
        async with self._image(request) as content:
            # A request counts from its last byte on: bodies that never come take nobody's place.
            self._check_room()
            self._count_in_flight(1)
            try:
                prediction = await asyncio.get_running_loop().run_in_executor(self._pool, engine.infer, content)
            finally:
                self._count_in_flight(-1)
        return engine.manifest.sequence, prediction

    def _check_room(self) -> None:
        if self._in_flight >= self.options.max_in_flight:
            raise OverloadedError(
                f"{self._in_flight} requests are waiting already; no more are taken.", cure="Ask again later."
            )

    @contextlib.asynccontextmanager
    async def _image(self, request: Request) -> AsyncIterator[bytes]:
        """The raw body, which counts among the bytes in memory while the block runs.

        Raises:
            BodyTooLargeError: it is larger than ``MAX_IMAGE_BYTES``.
            CompressedBodyError: it is compressed.
            BodyTimeoutError: it arrives too slowly.
            OverloadedError: too many bytes are in memory already.
        """
        declared_length(request.headers, MAX_IMAGE_BYTES)
        limits = BodyLimits(MAX_IMAGE_BYTES, BODY_TIMEOUT_S, LEAST_BODY_BYTES_PER_S, BODY_GRACE_S)
        received = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal received
            async for chunk in request.stream():
                received += len(chunk)
                self._buffered += len(chunk)
                if self._buffered > MAX_BUFFERED_BYTES:
                    raise OverloadedError("Too many images are being received.", cure="Ask again later.")
                yield chunk

        try:
            yield await read_body(counted(), limits)
        finally:
            self._buffered -= received

    def _count_in_flight(self, change: int) -> None:
        self._in_flight += change
        self._stats.waiting(self._in_flight)

    async def _health(self, _: Request) -> Response:
        manifest = self.service.engine.manifest
        return JSONResponse({"status": "ok", "model_version": manifest.version, "variant": manifest.variant})

    async def _health_detailed(self, _: Request) -> Response:
        service, engine = self.service, self.service.current
        status = "no model" if engine is None else "degraded" if service.last_error else "ok"
        body = {
            "status": status,
            "device_id": self.options.device_id,
            "model": None if engine is None else _describe(engine),
            "uptime_s": round(self._meter.uptime_s, 3),
            "requests_total": self._stats.requests_total,
            "errors_total": self._stats.errors_total,
            "in_flight": self._in_flight,
            "latency": self._stats.latency_ms(),
            "cpu_percent": self._meter.cpu_percent(),
            "memory_bytes": self._meter.memory_bytes(),
            "cache": await asyncio.to_thread(_describe_cache, self._cache),
            "source": self.options.source,
            "last_poll_at": service.last_poll_at.isoformat() if service.last_poll_at else None,
            "last_error": service.last_error,
        }
        return JSONResponse(body, status_code=503 if engine is None else 200)

    async def _metrics(self, _: Request) -> Response:
        body, content_type = await asyncio.to_thread(render, self.options.metrics_dir, self.registry)
        return Response(body, headers={"content-type": content_type})


def _outcome(error: FedvitError) -> str:
    if isinstance(error, DataError | BodyTooLargeError | CompressedBodyError | BodyTimeoutError):
        return "rejected"
    return "unavailable" if error.http_status == 503 else "failed"


def _describe(engine: InferenceEngine) -> dict[str, Any]:
    manifest = engine.manifest
    return {
        "version": manifest.version,
        "variant": manifest.variant,
        "sequence": manifest.sequence,
        "digest": manifest.artifact_digest,
        "bytes": manifest.artifact_bytes,
        "accuracy": manifest.metrics.get("accuracy"),
        "epsilon": manifest.epsilon,
        "delta": manifest.delta,
        "privacy_unit": manifest.privacy_unit,
        "created_at": manifest.created_at,
    }


def _describe_cache(folder: Path) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in folder.glob("*.onnx")]
    return {"folder": str(folder), "models": len(sizes), "bytes": sum(sizes)}
