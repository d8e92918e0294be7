"""Downloads of releases that fail: resumed, repeated with back-off, and refused where the disk has no room."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import httpx
import pytest
from tiny_release import MemoryFeed

from fedvit.errors import FedvitError, FeedUnavailableError, IntegrityError, StateError
from fedvit.registry.backoff import Backoff
from fedvit.registry.client import ReleaseClient
from fedvit.registry.feed import HttpFeed
from fedvit.testing.doubles import ManualClock

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed()


@pytest.fixture
def connect(feed: MemoryFeed, tmp_path: Path, clock: ManualClock) -> Callable[[], ReleaseClient]:
    """A client on the same cache each time, as after a restart."""
    return lambda: ReleaseClient(feed, tmp_path / "cache", [feed.key.public_key()], "standard", clock)


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def polls_until(client: ReleaseClient, clock: ManualClock, seconds: float, error: type[FedvitError]) -> None:
    """A poll each second, all of which fail."""
    for _ in range(int(seconds)):
        with pytest.raises(error):
            client.poll()
        clock.advance(1.0)


def test_a_download_that_fails_is_repeated_less_and_less_often(
    feed: MemoryFeed, connect: Callable[[], ReleaseClient], clock: ManualClock
) -> None:
    client = connect()
    manifest = feed.offer(CONTENT, 1)
    feed.blobs[manifest.artifact_digest] = CONTENT[:-1]
    polls_until(client, clock, 12, IntegrityError)
    few = feed.downloads
    assert 3 <= few <= 6
    polls_until(client, clock, 1200, IntegrityError)
    assert feed.downloads - few <= 16
    # Another release is fetched at once.
    feed.offer(CONTENT + b"!", 2)
    assert client.poll()


def test_without_room_nothing_is_downloaded(
    feed: MemoryFeed, connect: Callable[[], ReleaseClient], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    feed.offer(CONTENT, 1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: Disk(10**6, 10**6 - 5000, 5000))
        polls_until(client, clock, 12, StateError)
    assert feed.downloads == 0
    clock.advance(600)
    assert client.poll()


def test_a_disk_that_fills_during_the_download_is_left_with_what_it_had(
    feed: MemoryFeed, connect: Callable[[], ReleaseClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(digest: str, size: int, file: BinaryIO) -> None:
        file.write(CONTENT[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    client = connect()
    feed.offer(CONTENT, 1)
    with monkeypatch.context() as patch:
        patch.setattr(feed, "fetch", full)
        with pytest.raises(StateError):
            client.poll()
    assert list(client.folder.iterdir()) == []


def test_files_of_killed_downloads_are_removed(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    client = connect()
    (client.folder / ".tmp-0123456789abcdef").write_bytes(CONTENT)
    (client.folder / f"{'a' * 64}.part").write_bytes(CONTENT)
    feed.offer(CONTENT, 1)
    client = connect()
    assert client.poll()
    names = {path.name for path in client.folder.iterdir()}
    assert len(names) == 3
    assert names > {"release.json", "accepted.json"}


class Server:
    """A control server whose downloads break off after so many bytes."""

    def __init__(self, feed: MemoryFeed, breaks_after: int, *, ranges: bool = True) -> None:
        self.feed, self.breaks_after, self.ranges = feed, breaks_after, ranges
        self.sent: list[tuple[int, int]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/model/release":
            return httpx.Response(200, text=self.feed.envelope or "")
        content = self.feed.blobs[request.url.path.rpartition("/")[2]]
        asked = request.headers.get("range", "bytes=0-") if self.ranges else "bytes=0-"
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        headers = {"content-length": str(len(content) - start)}
        if start:
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return httpx.Response(206 if start else 200, headers=headers, content=self._body(content, start))

    def _body(self, content: bytes, start: int) -> Iterator[bytes]:
        part = content[start : start + self.breaks_after]
        self.sent.append((start, len(part)))
        yield part
        if start + len(part) < len(content):
            raise httpx.RemoteProtocolError("peer closed connection")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on_after_a_restart(
    feed: MemoryFeed, tmp_path: Path, clock: ManualClock, ranges: bool
) -> None:
    feed.offer(CONTENT, 1)
    server = Server(feed, 6000, ranges=ranges)

    def client() -> ReleaseClient:
        http = HttpFeed("http://control:8000", transport=httpx.MockTransport(server))
        return ReleaseClient(http, tmp_path / "cache", [feed.key.public_key()], "standard", clock)

    with pytest.raises(FeedUnavailableError):
        client().poll()
    server.breaks_after = 6000 if ranges else len(CONTENT)
    release = client().poll()
    assert release is not None
    assert release.model_path.read_bytes() == CONTENT
    assert server.sent == [(0, 6000), (6000, len(CONTENT) - 6000) if ranges else (0, len(CONTENT))]


def test_a_part_that_was_damaged_is_not_kept(feed: MemoryFeed, tmp_path: Path, clock: ManualClock) -> None:
    manifest = feed.offer(CONTENT, 1)
    http = HttpFeed("http://control:8000", transport=httpx.MockTransport(Server(feed, len(CONTENT))))
    client = ReleaseClient(http, tmp_path / "cache", [feed.key.public_key()], "standard", clock)
    (client.folder / f"{manifest.artifact_digest}.part").write_bytes(b"?" * 100)
    with pytest.raises(IntegrityError):
        client.poll()
    release = client.poll()
    assert release is not None
    assert release.model_path.read_bytes() == CONTENT


def test_another_part_than_was_asked_for_is_refused() -> None:
    headers = {"content-range": "bytes 0-99/100"}
    http = HttpFeed(
        "http://control:8000",
        transport=httpx.MockTransport(lambda _: httpx.Response(206, headers=headers, content=b"x")),
    )
    file = io.BytesIO(b"12345")
    file.seek(5)
    with pytest.raises(IntegrityError):
        http.fetch("a" * 64, 100, file)
    assert file.getvalue() == b"12345"


def test_delays_double_within_their_jitter_up_to_a_limit(clock: ManualClock) -> None:
    for draw, factor in ((0.0, 0.5), (0.5, 0.75)):
        backoff, waits = Backoff(clock, lambda draw=draw: draw), []  # type: ignore[misc]
        for _ in range(60):
            backoff.failed()
            waits.append(backoff.wait_s)
        assert waits[:4] == pytest.approx([0.0, 2 * factor, 4 * factor, 8 * factor])
        assert waits[-1] == pytest.approx(300 * factor)
        backoff.reset()
        assert backoff.wait_s == 0
