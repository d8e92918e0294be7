"""Client-side measurement of an inference target: predictions and latencies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from fedvit.api.transport import exchange, json_of, open_http
from fedvit.errors import DataError, FedvitError, IntegrityError

REQUEST_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The predictions and latencies of one pass over the images, in their order.

    ``latencies_s`` is measured by this client and includes the connection; ``server_latencies_s`` is reported by the
    target.
    """

    predictions: tuple[int, ...]
    latencies_s: tuple[float, ...]
    versions: frozenset[str]
    server_latencies_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TargetSummary:
    """The figures of one target. ``agreement`` is the share of images on which it predicts what the reference does."""

    accuracy: float
    agreement: float
    p50_ms: float
    p95_ms: float
    num_images: int


@dataclass(frozen=True, slots=True)
class _Answer:
    class_index: int
    model_version: str
    latency_s: float
    server_latency_s: float


@dataclass(frozen=True, slots=True)
class Target:
    """An inference target. ``ca_file`` (PEM) is trusted instead of the machine's certificates."""

    url: str
    token: str | None = None
    ca_file: Path | None = None

    def client(self, max_connections: int = 1) -> httpx.Client:
        """An HTTP client for this target."""
        return open_http(
            self.url,
            timeout_s=REQUEST_TIMEOUT_S,
            token=self.token,
            verify=self.ca_file or True,
            max_connections=max_connections,
        )

    def health(self, path: str, timeout_s: float) -> httpx.Response:
        """The response to ``GET path``.

        Raises:
            IntegrityError: it is longer than :data:`MAX_ANSWER_BYTES`, or compressed.
            httpx.HTTPError: there is none within ``timeout_s``.
        """
        with self.client() as http:
            return exchange(http, http.build_request("GET", path), max_bytes=MAX_ANSWER_BYTES, deadline_s=timeout_s)


def probe(
    target: Target, images: Sequence[bytes], *, concurrency: int = 1, on_image: Callable[[], None] | None = None
) -> ProbeResult:
    """POST every encoded image to the target's ``/infer``, ``concurrency`` at a time over kept-alive connections.

    ``on_image`` is called after each answer, from the calling thread.

    Raises:
        DataError: there is no image.
        FedvitError: a request failed or was answered with something else; names the URL and the status.
    """
    infer_url = f"{target.url}/infer"
    if not images:
        raise DataError(f"There is no image to send to {infer_url}.", cure="Probe with at least one test image.")
    answers: list[_Answer] = []
    with target.client(concurrency) as client, ThreadPoolExecutor(concurrency) as pool:
        for answer in pool.map(lambda image: _ask(client, infer_url, image), images):
            answers.append(answer)
            if on_image is not None:
                on_image()
    return ProbeResult(
        predictions=tuple(answer.class_index for answer in answers),
        latencies_s=tuple(answer.latency_s for answer in answers),
        versions=frozenset(answer.model_version for answer in answers),
        server_latencies_s=tuple(answer.server_latency_s for answer in answers),
    )


def _ask(client: httpx.Client, url: str, image: bytes) -> _Answer:
    started = time.perf_counter()
    try:
        headers = {"content-type": "application/octet-stream"}
        request = client.build_request("POST", url, content=image, headers=headers)
        response = exchange(client, request, max_bytes=MAX_ANSWER_BYTES, deadline_s=REQUEST_TIMEOUT_S)
    except (httpx.HTTPError, IntegrityError) as error:
        raise FedvitError(
            f"{url} did not answer: {type(error).__name__} {error}.", cure="Check that the target is running."
        ) from error
    latency_s = time.perf_counter() - started
    if not response.is_success:
        raise FedvitError(f"{url} answered {response.status_code}: {_reason(response)}.", status=response.status_code)
    return _parse(response, latency_s)


def _reason(response: httpx.Response) -> str:
    """The detail of a problem document (RFC 9457), or the beginning of the body."""
    try:
        text = str(json_of(response)["detail"])
    except (ValueError, TypeError, KeyError):
        text = response.text[:200] or response.reason_phrase
    return " ".join(text.split()).rstrip(".")


def _parse(response: httpx.Response, latency_s: float) -> _Answer:
    try:
        body = json_of(response)
        return _Answer(int(body["class_index"]), str(body["model_version"]), latency_s, float(body["duration_s"]))
    except (ValueError, TypeError, KeyError) as error:
        raise FedvitError(
            f"{response.url} answered {response.status_code} with no prediction: {type(error).__name__} {error}.",
            cure="Name the URL of a fedvit inference target.",
        ) from None


def summarise(result: ProbeResult, labels: Sequence[int], reference_predictions: Sequence[int]) -> TargetSummary:
    """Accuracy against ``labels``, agreement with the reference, and client-side latency percentiles.

    Raises:
        ValueError: the three lengths differ.
    """
    predictions = np.asarray(result.predictions)
    if not len(predictions) == len(labels) == len(reference_predictions):
        raise ValueError(
            f"{len(predictions)} predictions, {len(labels)} labels, {len(reference_predictions)} references"
        )
    p50_s, p95_s = np.percentile(result.latencies_s, [50, 95])
    return TargetSummary(
        accuracy=float(np.mean(predictions == np.asarray(labels))),
        agreement=float(np.mean(predictions == np.asarray(reference_predictions))),
        p50_ms=float(p50_s) * 1e3,
        p95_ms=float(p95_s) * 1e3,
        num_images=len(predictions),
    )
