from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from raises import raises_naming
from starlette.middleware import Middleware
from tiny_release import CLASSES, IMAGE_SIZE, MemoryFeed, png, tiny_model

import edge_runtime.server as server_module
from edge_runtime.access import access_rules
from edge_runtime.engine import InferenceEngine, Prediction
from edge_runtime.server import ServingOptions, ServingProcess
from fedvit.errors import UsageError
from fedvit.metrics.exposition import predictions_by_class
from fedvit.registry.client import ReleaseClient
from fedvit.wire.images import MAX_IMAGE_BYTES

TOKEN = "0123456789abcdef"


@pytest.fixture
def feed() -> MemoryFeed:
    feed = MemoryFeed()
    feed.offer(tiny_model(), 1)
    return feed


@pytest.fixture
def make(feed: MemoryFeed, tmp_path: Path) -> Callable[..., ServingProcess]:
    """A process that has asked its source once and polls no more during the test."""

    def process(**options: Any) -> ServingProcess:
        client = ReleaseClient(feed, tmp_path / "cache", [feed.key.public_key()], "standard")
        result = ServingProcess(client, ServingOptions("edge-7", "memory", poll_interval_s=3600, **options))
        result.service.refresh()
        return result

    return process


@asynccontextmanager
async def asking(process: ServingProcess, *middleware: Middleware) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(process.app(*middleware), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as http:
        yield http


def ask(process: ServingProcess, method: str, path: str, *middleware: Middleware, **more: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with asking(process, *middleware) as http:
            return await http.request(method, path, **more)

    return asyncio.run(once())


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["type"] == f"/problems/{code}"
    assert body["title"]
    assert body["detail"]
    return body


def test_an_image_is_answered_with_everything_about_the_prediction(make: Callable[..., ServingProcess]) -> None:
    response = ask(make(), "POST", "/infer", content=png((0, 0, 255)))
    assert response.status_code == 200
    body = response.json()
    assert body["class_index"] == 2
    assert body["label"] == "blue"
    assert body["confidence"] > 0.99
    assert tuple(body["probabilities"]) == CLASSES
    assert body["model_version"] == "v0.0.1"
    assert body["variant"] == "standard"
    assert body["duration_s"] > 0
    assert len(body) == 7


@pytest.mark.parametrize("content", [b"", b"junk", png()[:40]], ids=["empty", "junk", "cut"])
def test_a_bad_image_is_a_problem_with_a_cure(make: Callable[..., ServingProcess], content: bytes) -> None:
    body = assert_problem(ask(make(), "POST", "/infer", content=content), 422, "invalid-data")
    assert body["cure"]


def form(content: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + content + b"\r\n--x--\r\n"


@pytest.mark.parametrize(
    "content",
    [
        form(png()),
        json.dumps({"image": base64.b64encode(png()).decode()}).encode(),
        json.dumps([[0, 0, 255]] * 16).encode(),
        base64.b64encode(png()),
        b"data:image/png;base64," + base64.b64encode(png()),
        b"\x93NUMPY\x01\0" + bytes(3000),
        bytes(3 * IMAGE_SIZE**2),
        png().replace(b"\r", b"").replace(b"\n", b""),
        b"\xff\xd8\xff\xe0" + b"x" * 5000,
    ],
    ids=["form", "base64 in JSON", "list", "base64", "data URL", "array file", "pixels", "curl -d", "curl -d of JPEG"],
)
def test_an_upload_of_another_kind_is_told_what_to_send(make: Callable[..., ServingProcess], content: bytes) -> None:
    body = assert_problem(ask(make(), "POST", "/infer", content=content), 422, "invalid-data")
    assert "curl --data-binary @image.jpg" in body["cure"]


def test_without_a_model_the_caller_is_told_to_come_back(make: Callable[..., ServingProcess], feed: MemoryFeed) -> None:
    feed.envelope = None
    process = make()
    for method, path in (("POST", "/infer"), ("GET", "/health")):
        response = ask(process, method, path, content=png())
        assert_problem(response, 503, "no-model")
        assert int(response.headers["retry-after"]) >= 1
    detailed = ask(process, "GET", "/health/detailed")
    assert detailed.status_code == 503
    assert detailed.json()["status"] == "no model"
    assert detailed.json()["model"] is None


def test_a_declared_or_actual_length_over_the_limit_is_refused(make: Callable[..., ServingProcess]) -> None:
    process = make()
    declared = ask(process, "POST", "/infer", content=b"x", headers={"content-length": str(MAX_IMAGE_BYTES + 1)})
    assert_problem(declared, 413, "body-too-large")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(MAX_IMAGE_BYTES // 2**20 + 1):
            yield bytes(2**20)

    assert_problem(ask(process, "POST", "/infer", content=chunks()), 413, "body-too-large")


def test_a_body_that_never_comes_is_given_up(
    make: Callable[..., ServingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "BODY_TIMEOUT_S", 0.05)

    async def never() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    assert_problem(ask(make(), "POST", "/infer", content=never()), 408, "request-timeout")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/infer", 405)])
def test_wrong_paths_and_methods_are_problems(
    make: Callable[..., ServingProcess], method: str, path: str, status: int
) -> None:
    assert_problem(ask(make(), method, path), status, "http")


def test_a_surprise_does_not_show_its_insides(
    make: Callable[..., ServingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprise(*_: object) -> Prediction:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(InferenceEngine, "infer", surprise)
    process = make()
    body = assert_problem(ask(process, "POST", "/infer", content=png()), 500, "internal-error")
    assert "secret" not in str(body)
    assert ask(process, "GET", "/health/detailed").json()["errors_total"] == 1


def test_health_names_the_model_and_counts_requests(make: Callable[..., ServingProcess], feed: MemoryFeed) -> None:
    process = make()
    assert ask(process, "GET", "/health").json() == {
        "status": "ok",
        "model_version": "v0.0.1",
        "variant": "standard",
    }
    before = ask(process, "GET", "/health/detailed").json()
    assert before["latency"] == {"p50_ms": None, "p95_ms": None, "p99_ms": None}
    for content in (png(), png(), b"junk"):
        ask(process, "POST", "/infer", content=content)
    feed.offer(b"no model", 2)
    process.service.refresh()
    body = ask(process, "GET", "/health/detailed").json()
    assert body["status"] == "degraded"
    assert "v0.0.2" in body["last_error"]
    assert body["device_id"] == "edge-7"
    assert body["source"] == "memory"
    assert body["model"]["sequence"] == 1
    assert body["model"]["accuracy"] == 0.9
    assert body["model"]["epsilon"] == 1.5
    assert (body["requests_total"], body["errors_total"]) == (3, 1)
    assert 0 < body["latency"]["p50_ms"] <= body["latency"]["p95_ms"] <= body["latency"]["p99_ms"]
    assert body["memory_bytes"] > 10**7
    assert body["cache"]["models"] == 2
    assert body["last_poll_at"]
    assert body["uptime_s"] > 0


def test_metrics_have_one_series_for_the_version_that_serves(
    make: Callable[..., ServingProcess], feed: MemoryFeed
) -> None:
    process = make()
    name = "fed_vit_autorl_inference_duration_seconds_count"
    for content in (png(), png(), b"junk"):
        ask(process, "POST", "/infer", content=content)
    response = ask(process, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert f'{name}{{model_version="v0.0.1"}} 2.0' in response.text
    assert 'fed_vit_autorl_inference_requests_total{outcome="ok"} 2.0' in response.text
    assert 'fed_vit_autorl_inference_requests_total{outcome="rejected"} 1.0' in response.text
    feed.offer(tiny_model(1.0), 2)
    process.service.refresh()
    ask(process, "POST", "/infer", content=png())
    after = ask(process, "GET", "/metrics").text
    assert f'{name}{{model_version="v0.0.2"}} 1.0' in after
    assert "v0.0.1" not in after


def test_health_answers_while_every_thread_is_busy_and_more_is_refused(
    make: Callable[..., ServingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    release, busy = threading.Event(), threading.Semaphore(0)
    infer = InferenceEngine.infer

    def slow(engine: InferenceEngine, content: bytes) -> Prediction:
        busy.release()
        assert release.wait(30)
        return infer(engine, content)

    monkeypatch.setattr(InferenceEngine, "infer", slow)

    async def scenario() -> tuple[httpx.Response, httpx.Response, list[httpx.Response]]:
        async with asking(make(workers=1, max_in_flight=3)) as http:
            waiting = [asyncio.create_task(http.post("/infer", content=png())) for _ in range(3)]
            try:
                assert await asyncio.to_thread(busy.acquire, timeout=30)
                async with asyncio.timeout(30):
                    while (await http.get("/health/detailed")).json()["in_flight"] < 3:
                        await asyncio.sleep(0)
                health, refused = await http.get("/health"), await http.post("/infer", content=png())
            finally:
                release.set()
            return health, refused, list(await asyncio.gather(*waiting))

    health, refused, answered = asyncio.run(scenario())
    assert health.status_code == 200
    assert_problem(refused, 503, "overloaded")
    assert "retry-after" in refused.headers
    assert [response.status_code for response in answered] == [200, 200, 200]


def test_models_are_switched_under_requests_without_one_failing(
    make: Callable[..., ServingProcess], feed: MemoryFeed
) -> None:
    async def scenario(process: ServingProcess) -> list[httpx.Response]:
        answers: list[httpx.Response] = []
        async with asking(process) as http:
            for sequence in range(2, 8):
                feed.offer(tiny_model(float(sequence)), sequence)
                switch = asyncio.create_task(asyncio.to_thread(process.service.refresh))
                while not switch.done():
                    answers += await asyncio.gather(*(http.post("/infer", content=png()) for _ in range(8)))
                assert switch.result()
            answers.append(await http.post("/infer", content=png()))
        return answers

    answers = asyncio.run(scenario(make()))
    assert {response.status_code for response in answers} == {200}
    assert {response.json()["label"] for response in answers} == {"red"}
    assert answers[-1].json()["model_version"] == "v0.0.7"


def test_the_lifespan_polls_and_stops(feed: MemoryFeed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polls, current = threading.Semaphore(0), feed.current

    def counted(variant: str) -> str | None:
        polls.release()
        return current(variant)

    monkeypatch.setattr(feed, "current", counted)
    client = ReleaseClient(feed, tmp_path, [feed.key.public_key()], "standard")
    process = ServingProcess(client, ServingOptions("edge-1", "memory", poll_interval_s=0.01))
    app = process.app()

    async def scenario() -> None:
        async with app.router.lifespan_context(app):
            # The second poll begins when the first one has loaded the model.
            for _ in range(2):
                assert await asyncio.to_thread(polls.acquire, timeout=30)
            assert process.service.engine.manifest.sequence == 1

    asyncio.run(scenario())
    assert not any(thread.name == "release-poll" for thread in threading.enumerate())


def test_off_loopback_a_token_is_demanded(make: Callable[..., ServingProcess], tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")
    rules = access_rules("0.0.0.0", token_file)
    process = make()
    good, bad = {"authorization": f"Bearer {TOKEN}"}, {"authorization": "Bearer something else"}
    assert ask(process, "POST", "/infer", *rules, content=png(), headers=good).status_code == 200
    assert ask(process, "GET", "/health", *rules).status_code == 200
    for headers in ({}, bad, {"authorization": TOKEN}):
        response = ask(process, "POST", "/infer", *rules, content=png(), headers=headers)
        assert_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    assert ask(process, "GET", "/metrics", *rules).status_code == 401


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_token(make: Callable[..., ServingProcess], host: str) -> None:
    name = f"[{host}]" if ":" in host else host
    headers = {"Host": f"{name}:8081", "Origin": f"http://{name}:8081"}
    for sent in (headers, {"Host": headers["Host"]}):
        assert ask(make(), "GET", "/health", *access_rules(host, None), headers=sent).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost:8081", "Origin": "http://localhost:3000"},
        {"Host": "localhost:8081", "Origin": "https://localhost:8081"},
        {"Host": "localhost:8081", "Origin": "null"},
        {"Host": "evil.example"},
    ],
)
def test_without_a_token_a_page_of_another_origin_is_refused(
    make: Callable[..., ServingProcess], headers: dict[str, str]
) -> None:
    process, rules = make(), access_rules("127.0.0.1", None)
    for method, path in (("POST", "/infer"), ("GET", "/health"), ("GET", "/metrics")):
        assert_problem(ask(process, method, path, *rules, content=png(), headers=headers), 403, "forbidden")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "vehicle.example"])
def test_any_other_address_does(host: str, tmp_path: Path) -> None:
    with raises_naming(UsageError, host):
        access_rules(host, None)
    with pytest.raises(UsageError):
        access_rules(host, tmp_path / "absent")
    short = tmp_path / "short"
    short.write_text("abc")
    with raises_naming(UsageError, "3 characters"):
        access_rules(host, short)


def test_callers_do_not_get_the_token_that_the_edge_itself_sends(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "source.token", tmp_path / "inbound.token"
    ours.write_text("a" * 32 + "\n")
    theirs.write_text("a" * 32)
    with pytest.raises(UsageError):
        access_rules("0.0.0.0", theirs, ours)
    theirs.write_text("b" * 32)
    assert len(access_rules("0.0.0.0", theirs, ours)) == 1


def test_only_who_is_told_to_counts_what_it_answered(make: Callable[..., ServingProcess]) -> None:
    replica, vehicle = make(count_answers=True), make()
    for process in (replica, vehicle):
        for colour in ((0, 0, 255), (0, 0, 255), (255, 0, 0)):
            assert ask(process, "POST", "/infer", content=png(colour)).status_code == 200
    assert predictions_by_class("v0.0.1", None, replica.registry) == {0: 1, 2: 2}
    assert predictions_by_class("v0.0.1", None, vehicle.registry) == {}
