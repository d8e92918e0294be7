"""The probe against a small HTTP server: what it counts, and how it fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from raises import raises_naming

from fedvit.errors import DataError, FedvitError
from fedvit.tools.report.probe import ProbeResult, Target, probe, summarise

Answer = tuple[int, bytes]


@dataclass
class Server:
    """A server that answers every POST by ``answer``; it remembers what it was asked."""

    answer: Callable[[bytes], Answer]
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    content_types: set[str | None] = field(default_factory=set)
    connections: set[object] = field(default_factory=set)


def prediction(body: bytes) -> Answer:
    answer = {"class_index": body[0], "label": "x", "model_version": "v7", "duration_s": 0.25}
    return 200, json.dumps(answer).encode()


@pytest.fixture
def target() -> Iterator[Server]:
    known = Server(prediction)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known.bodies.append(body)
            known.content_types.add(self.headers["Content-Type"])
            known.connections.add(self.client_address)
            status, content = known.answer(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        known.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield known
        server.shutdown()
        thread.join()


IMAGES = [bytes([i, 255 - i]) for i in range(12)]


def test_every_image_is_sent_once_over_one_connection(target: Server) -> None:
    seen: list[str] = []
    result = probe(Target(target.url), IMAGES, on_image=lambda: seen.append(threading.current_thread().name))
    assert target.bodies == IMAGES
    assert target.content_types == {"application/octet-stream"}
    assert len(target.connections) == 1
    assert result.predictions == tuple(range(12))
    assert result.versions == {"v7"}
    assert result.server_latencies_s == (0.25,) * 12
    assert len(result.latencies_s) == 12
    assert min(result.latencies_s) > 0
    assert seen == [threading.current_thread().name] * 12


def test_concurrent_answers_keep_the_order_of_the_images(target: Server) -> None:
    first_may_answer = threading.Event()

    def answer(body: bytes) -> Answer:
        # The first image is answered only after the second one came.
        if body[0] == 0:
            assert first_may_answer.wait(30)
        elif body[0] == 1:
            first_may_answer.set()
        return prediction(body)

    target.answer = answer
    assert probe(Target(target.url), IMAGES, concurrency=3).predictions == tuple(range(12))
    assert 1 < len(target.connections) <= 3


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    target: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert probe(Target(target.url), IMAGES[:1]).predictions == (0,)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b'{"detail": "no model is loaded."}', "no model is loaded"), (b"gone fishing", "gone fishing"), (b"", "Service")],
)
def test_a_refusal_names_url_status_and_reason(target: Server, content: bytes, reason: str) -> None:
    target.answer = lambda body: (503, content)
    with pytest.raises(FedvitError) as caught:
        probe(Target(target.url), IMAGES)
    assert target.url in caught.value.message
    assert "503" in caught.value.message
    assert reason in caught.value.message
    assert caught.value.details["status"] == 503


def test_the_first_failure_ends_the_probe(target: Server) -> None:
    target.answer = lambda body: (500, b"") if body[0] == 2 else prediction(body)
    seen: list[None] = []
    with raises_naming(FedvitError, "500"):
        probe(Target(target.url), IMAGES, on_image=lambda: seen.append(None))
    assert len(seen) == 2


@pytest.mark.parametrize("content", [b"<html>", b"[1]", b'{"class_index": 1}', b'{"class_index": null}'])
def test_an_answer_that_is_no_prediction(target: Server, content: bytes) -> None:
    target.answer = lambda body: (200, content)
    with raises_naming(FedvitError, "200"):
        probe(Target(target.url), IMAGES)


def test_nobody_listens() -> None:
    with raises_naming(FedvitError, "http://127.0.0.1:1/infer", "ConnectError") as caught:
        probe(Target("http://127.0.0.1:1"), IMAGES)
    assert caught.value.cure


def test_no_images() -> None:
    with pytest.raises(DataError):
        probe(Target("http://127.0.0.1:1"), [])


class TestSummarise:
    result = ProbeResult((0, 1, 1, 2), (0.010, 0.020, 0.030, 0.040), frozenset({"v7"}), (0.0,) * 4)

    def test_shares_and_percentiles(self) -> None:
        summary = summarise(self.result, labels=(0, 1, 2, 2), reference_predictions=(0, 1, 1, 1))
        assert (summary.accuracy, summary.agreement, summary.num_images) == (0.75, 0.75, 4)
        assert summary.p50_ms == pytest.approx(25.0)
        assert summary.p95_ms == pytest.approx(38.5)

    def test_lengths_must_agree(self) -> None:
        with pytest.raises(ValueError):
            summarise(self.result, labels=(0, 1, 2), reference_predictions=(0, 1, 1, 1))
