from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_release import MemoryFeed, png, tiny_model

from edge_runtime.engine import InferenceEngine
from edge_runtime.service import ModelService
from fedvit.errors import FeedUnavailableError, IntegrityError, NoModelError
from fedvit.registry.client import ReleaseClient
from fedvit.testing.doubles import ManualClock
from fedvit.wire.manifest import ReleaseManifest


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed()


@pytest.fixture
def connect(feed: MemoryFeed, tmp_path: Path) -> Callable[[], ModelService]:
    return lambda: ModelService(ReleaseClient(feed, tmp_path, [feed.key.public_key()], "standard"))


def test_before_the_first_release_there_is_no_model(feed: MemoryFeed, connect: Callable[[], ModelService]) -> None:
    service = connect()
    assert not service.refresh()
    with pytest.raises(NoModelError):
        _ = service.engine
    assert service.current is None
    assert service.last_poll_at is not None
    feed.offer(tiny_model(), 1)
    assert service.refresh()
    assert service.engine.manifest.sequence == 1


def test_an_altered_release_is_refused_and_the_old_one_serves_on(
    feed: MemoryFeed, connect: Callable[[], ModelService]
) -> None:
    service = connect()
    feed.offer(tiny_model(), 1)
    assert service.refresh()
    manifest = feed.offer(tiny_model(1.0), 2)
    content = bytearray(feed.blobs[manifest.artifact_digest])
    content[len(content) // 2] ^= 1
    feed.blobs[manifest.artifact_digest] = bytes(content)
    assert not service.refresh()
    assert service.engine.manifest.sequence == 1
    assert service.engine.infer(png()).label == "red"
    assert "artifact of v0.0.2" in (service.last_error or "")
    feed.offer(tiny_model(1.0), 3)
    assert service.refresh()
    assert service.last_error is None


def test_a_signed_release_that_cannot_be_loaded_is_remembered_until_the_next_one(
    feed: MemoryFeed, connect: Callable[[], ModelService]
) -> None:
    service = connect()
    feed.offer(tiny_model(), 1)
    assert service.refresh()
    feed.offer(b"signed, and yet no model", 2)
    assert not service.refresh()
    assert not service.refresh()
    assert service.engine.manifest.sequence == 1
    assert "v0.0.2 cannot be loaded" in (service.last_error or "")
    restarted = connect()
    assert restarted.load_cached()
    assert restarted.engine.manifest.sequence == 1
    feed.offer(tiny_model(2.0), 3)
    assert restarted.refresh()
    assert restarted.last_error is None


@pytest.mark.parametrize("online", [True, False])
def test_a_release_whose_first_load_failed_is_tried_again(
    feed: MemoryFeed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: bool
) -> None:
    clock = ManualClock()

    def connect() -> ModelService:
        client = ReleaseClient(feed, tmp_path, [feed.key.public_key()], "standard", clock)
        return ModelService(client, clock=clock)

    def out_of_memory(*_: object) -> None:
        raise IntegrityError("The model file cannot be loaded: out of memory.")

    service = connect()
    feed.offer(tiny_model(), 1)
    assert service.refresh()
    feed.offer(tiny_model(1.0), 2)
    with monkeypatch.context() as patch:
        patch.setattr("edge_runtime.service.InferenceEngine", out_of_memory)
        assert not service.refresh()
    if not online:
        feed.error = FeedUnavailableError("away")
    assert service.refresh()
    assert service.engine.manifest.sequence == 2
    assert feed.downloads == 2


def test_a_cached_release_whose_load_failed_at_the_start_is_tried_again_without_a_source(
    feed: MemoryFeed, connect: Callable[[], ModelService], monkeypatch: pytest.MonkeyPatch
) -> None:
    for sequence in (1, 2):
        feed.offer(tiny_model(float(sequence)), sequence)
        assert connect().refresh()
    feed.error, failures = FeedUnavailableError("away"), [2]

    def engine(path: Path, manifest: ReleaseManifest, threads: int) -> InferenceEngine:
        if manifest.sequence in failures:
            raise IntegrityError("out of memory")
        return InferenceEngine(path, manifest, threads)

    monkeypatch.setattr("edge_runtime.service.InferenceEngine", engine)
    service = connect()
    assert service.load_cached()
    assert service.engine.manifest.sequence == 1
    failures.clear()
    assert service.refresh()
    assert service.engine.manifest.sequence == 2


def test_a_lost_source_is_reported_and_recovered_from(feed: MemoryFeed, connect: Callable[[], ModelService]) -> None:
    service = connect()
    feed.offer(tiny_model(), 1)
    assert service.refresh()
    feed.error = FeedUnavailableError("The source is away.")
    assert not service.refresh()
    assert service.last_error == "The source is away."
    feed.error = None
    assert not service.refresh()
    assert service.last_error is None


def test_an_offline_start_serves_from_the_cache(feed: MemoryFeed, connect: Callable[[], ModelService]) -> None:
    feed.offer(tiny_model(), 1)
    assert connect().refresh()
    feed.error = FeedUnavailableError("away")
    service = connect()
    service.start(poll_interval_s=60)
    try:
        assert service.engine.infer(png()).label == "red"
    finally:
        service.stop()


def test_a_poll_survives_a_surprise(feed: MemoryFeed, connect: Callable[[], ModelService]) -> None:
    surprised, recovered = threading.Event(), threading.Event()
    service = connect()
    current = feed.current

    def surprising(variant: str) -> str | None:
        if not surprised.is_set():
            surprised.set()
            raise ZeroDivisionError("of all things")
        recovered.set()
        return current(variant)

    feed.current = surprising  # type: ignore[method-assign]
    service.start(poll_interval_s=0.01)
    try:
        assert recovered.wait(10)
    finally:
        service.stop()


def test_swaps_happen_under_requests_without_one_failing(feed: MemoryFeed, connect: Callable[[], ModelService]) -> None:
    """Readers run until every version was seen; each answer must be right, whichever version gave it."""
    service = connect()
    feed.offer(tiny_model(), 1)
    assert service.refresh()
    last, done = 12, threading.Event()
    image = png((0, 255, 0))

    def read() -> list[tuple[str, str]]:
        answers = []
        while not done.is_set():
            prediction = service.engine.infer(image)
            answers.append((prediction.label, prediction.model_version))
        prediction = service.engine.infer(image)
        return [*answers, (prediction.label, prediction.model_version)]

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        try:
            for sequence in range(2, last + 1):
                feed.offer(tiny_model(float(sequence)), sequence)
                assert service.refresh()
        finally:
            done.set()
        answers = [answer for reader in readers for answer in reader.result()]
    assert {label for label, _ in answers} == {"green"}
    assert f"v0.0.{last}" in {version for _, version in answers}


def test_a_swap_tells_which_release_serves(feed: MemoryFeed, tmp_path: Path) -> None:
    results: list[tuple[str, int]] = []
    client = ReleaseClient(feed, tmp_path, [feed.key.public_key()], "standard")
    service = ModelService(client, on_swap=lambda manifest: results.append((manifest.version, manifest.sequence)))
    for sequence in (1, 2):
        feed.offer(tiny_model(float(sequence)), sequence)
        assert service.refresh()
    assert results == [("v0.0.1", 1), ("v0.0.2", 2)]
