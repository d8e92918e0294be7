from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from raises import raises_naming
from tiny_release import MemoryFeed

from fedvit.api.problems import problem_document
from fedvit.errors import (
    FeedUnavailableError,
    IntegrityError,
    NoReleaseError,
    NotFoundError,
    StateError,
    UsageError,
)
from fedvit.registry.client import ReleaseClient, write_release_folder
from fedvit.registry.feed import FolderFeed, HttpFeed, open_feed
from fedvit.wire.manifest import MAX_ENVELOPE_BYTES, sign_manifest

OLD, NEW = b"the old model", b"the new model"
NO_RELEASE = httpx.Response(404, json=problem_document(NoReleaseError("No model version is released yet.")))


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed()


@pytest.fixture
def connect(feed: MemoryFeed, tmp_path: Path) -> Callable[[], ReleaseClient]:
    """A client on the same cache each time, as after a restart."""
    return lambda: ReleaseClient(feed, tmp_path / "cache", [feed.key.public_key()], "standard")


def test_a_new_release_is_fetched_once(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    client = connect()
    assert client.poll() is None
    manifest = feed.offer(OLD, 1)
    release = client.poll()
    assert release is not None
    assert release.manifest == manifest
    assert release.model_path.read_bytes() == OLD
    assert client.poll() is None
    assert feed.downloads == 1


def test_the_same_release_signed_again_is_nothing_new(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    client = connect()
    manifest = feed.offer(OLD, 1)
    assert client.poll()
    feed.envelope = sign_manifest(manifest, feed.key).replace(", ", ",  ")
    assert client.poll() is None
    assert feed.downloads == 1


def test_a_lower_sequence_is_refused_also_after_a_restart(
    feed: MemoryFeed, connect: Callable[[], ReleaseClient]
) -> None:
    feed.offer(NEW, 5)
    client = connect()
    assert client.poll()
    feed.offer(OLD, 4)
    for victim in (client, connect()):
        with pytest.raises(IntegrityError, match="sequence 4; 5 was accepted before"):
            victim.poll()


def test_losing_the_cached_release_does_not_lose_the_memory(
    feed: MemoryFeed, connect: Callable[[], ReleaseClient]
) -> None:
    feed.offer(NEW, 5)
    client = connect()
    assert client.poll()
    for path in (*client.folder.glob("*.onnx"), client.folder / "release.json"):
        path.unlink()
    feed.offer(OLD, 4)
    with pytest.raises(IntegrityError, match="5 was accepted"):
        connect().poll()
    feed.offer(NEW, 5)
    assert connect().poll()


def test_a_damaged_memory_refuses_everything(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    feed.offer(OLD, 1)
    client = connect()
    (client.folder / "accepted.json").write_text("[1]")
    with raises_naming(StateError, "accepted.json"):
        client.poll()


def test_a_rollback_under_a_higher_sequence_needs_no_download(
    feed: MemoryFeed, connect: Callable[[], ReleaseClient]
) -> None:
    client = connect()
    for sequence, content in enumerate((OLD, NEW, OLD), start=1):
        feed.offer(content, sequence)
        release = client.poll()
        assert release is not None
        assert release.model_path.read_bytes() == content
    assert feed.downloads == 2


def test_two_releases_with_one_sequence_are_refused(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    client = connect()
    feed.offer(OLD, 1)
    assert client.poll()
    feed.offer(NEW, 1)
    with pytest.raises(IntegrityError, match="two different releases"):
        client.poll()


@pytest.mark.parametrize("change", ["flip", "cut", "grow", "empty"])
def test_an_altered_artifact_is_refused_and_leaves_nothing_behind(
    feed: MemoryFeed, connect: Callable[[], ReleaseClient], change: str
) -> None:
    client = connect()
    feed.offer(OLD, 1)
    assert client.poll()
    manifest = feed.offer(NEW, 2)
    altered = {"flip": bytes([NEW[0] ^ 1]) + NEW[1:], "cut": NEW[:-1], "grow": NEW + b"!", "empty": b""}[change]
    feed.blobs[manifest.artifact_digest] = altered
    with raises_naming(IntegrityError, "v0.0.2"):
        client.poll()
    assert [path.read_bytes() for path in client.folder.glob("*.onnx")] == [OLD]
    assert [release.manifest.sequence for release in connect().cached()] == [1]
    feed.blobs[manifest.artifact_digest] = NEW
    healed = client.poll()
    assert healed is not None
    assert healed.manifest == manifest


def test_nothing_is_downloaded_for_a_release_that_nobody_trusted_signed(
    feed: MemoryFeed, connect: Callable[[], ReleaseClient]
) -> None:
    client = connect()
    feed.key = Ed25519PrivateKey.generate()
    feed.offer(OLD, 1)
    with pytest.raises(IntegrityError, match="not trusted"):
        client.poll()
    assert feed.downloads == 0


def test_another_variant_is_refused(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    feed.offer(OLD, 1, variant="edge_optimized")
    with raises_naming(IntegrityError, "edge_optimized"):
        connect().poll()


def test_an_offline_start_finds_the_last_two_releases(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    client = connect()
    for sequence, content in enumerate((b"oldest", OLD, NEW), start=1):
        feed.offer(content, sequence)
        assert client.poll()
    feed.error = FeedUnavailableError("away")
    kept = list(connect().cached())
    assert [release.model_path.read_bytes() for release in kept] == [NEW, OLD]
    assert len(list(client.folder.glob("*.onnx"))) == 2


def test_an_adopted_release_is_not_fetched_again(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    feed.offer(OLD, 1)
    assert connect().poll()
    restarted = connect()
    restarted.adopt(next(restarted.cached()))
    assert restarted.poll() is None
    assert feed.downloads == 1


def test_a_cached_model_that_rotted_is_passed_over(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    client = connect()
    feed.offer(OLD, 1)
    assert client.poll()
    feed.offer(NEW, 2)
    release = client.poll()
    assert release is not None
    release.model_path.write_bytes(NEW[:-1] + b"?")
    assert [kept.manifest.sequence for kept in connect().cached()] == [1]
    again = connect().poll()
    assert again is not None
    assert again.model_path.read_bytes() == NEW


def test_a_cache_that_another_key_signed_is_not_served(feed: MemoryFeed, connect: Callable[[], ReleaseClient]) -> None:
    feed.offer(NEW, 9)
    assert connect().poll()
    feed.key = Ed25519PrivateKey.generate()
    fresh = connect()
    assert list(fresh.cached()) == []
    feed.offer(OLD, 1)
    # The old key's releases say nothing about the new key's.
    assert fresh.poll()


def test_while_two_keys_are_trusted_neither_can_go_back(feed: MemoryFeed, tmp_path: Path) -> None:
    new_key = Ed25519PrivateKey.generate()
    both = ReleaseClient(feed, tmp_path, [feed.key.public_key(), new_key.public_key()], "standard")
    feed.offer(NEW, 9)
    assert both.poll()
    feed.key = new_key
    feed.offer(OLD, 8)
    with pytest.raises(IntegrityError, match="9 was accepted"):
        both.poll()


def test_no_trusted_key_is_an_error(feed: MemoryFeed, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        ReleaseClient(feed, tmp_path, [], "standard")


def test_a_cache_that_cannot_be_made_is_said(feed: MemoryFeed, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StateError):
        ReleaseClient(feed, tmp_path / "file", [feed.key.public_key()], "standard")


def test_a_release_folder_is_a_feed(feed: MemoryFeed, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    client = ReleaseClient(open_feed(str(folder)), tmp_path / "cache", [feed.key.public_key()], "standard")
    assert client.poll() is None
    manifest = feed.offer(OLD, 1)
    assert feed.envelope is not None
    write_release_folder(folder, feed.envelope, OLD)
    release = client.poll()
    assert release is not None
    assert release.manifest == manifest
    (folder / "model.onnx").write_bytes(NEW)
    feed.offer(OLD + b"!", 2)
    write_release_folder(folder, feed.envelope, NEW * 100)
    with raises_naming(IntegrityError, "14 bytes"):
        client.poll()


def test_a_release_folder_without_its_model_is_said(feed: MemoryFeed, tmp_path: Path) -> None:
    feed.offer(OLD, 1)
    assert feed.envelope is not None
    (tmp_path / "release.json").write_text(feed.envelope)
    with raises_naming(NotFoundError, "model.onnx"):
        ReleaseClient(FolderFeed(tmp_path), tmp_path / "cache", [feed.key.public_key()], "standard").poll()


@pytest.mark.parametrize("source", ["no/such/folder", "ftp://host", "http://", "http:///path"])
def test_a_source_that_cannot_be_one_is_said(source: str) -> None:
    with pytest.raises(UsageError) as error:
        open_feed(source)
    assert repr(source) in error.value.message


def http_feed(answer: Callable[[httpx.Request], httpx.Response]) -> HttpFeed:
    return HttpFeed("http://control:8000/", transport=httpx.MockTransport(answer))


def test_http_asks_what_the_control_api_answers(feed: MemoryFeed, tmp_path: Path) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        if request.url.path == "/api/model/release":
            return httpx.Response(200, text=feed.envelope) if feed.envelope else NO_RELEASE
        return httpx.Response(200, content=feed.blobs[request.url.path.rpartition("/")[2]])

    client = ReleaseClient(http_feed(answer), tmp_path, [feed.key.public_key()], "standard")
    assert client.poll() is None
    manifest = feed.offer(OLD, 1)
    assert client.poll()
    client.close()
    base = "http://control:8000/api/model"
    assert asked[1:] == [f"{base}/release?variant=standard", f"{base}/blobs/{manifest.artifact_digest}"]


def test_http_sends_the_token_of_its_file_and_no_other_header(tmp_path: Path) -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return NO_RELEASE

    (tmp_path / "token").write_text("fvt_x_y\n")
    for token_file in (tmp_path / "token", None):
        HttpFeed("http://control:8000", transport=httpx.MockTransport(answer), token_file=token_file).current(
            "standard"
        )
    assert seen == ["Bearer fvt_x_y", None]


@pytest.mark.parametrize("content", [None, b"", b"\n", b"a\nb", b"\xff"])
def test_http_a_token_or_certificate_file_that_is_none_is_said(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError):
        open_feed("http://control:8000", token_file=path)
    with pytest.raises(UsageError):
        open_feed("https://control:8000", ca_file=path)


def test_http_stops_reading_an_answer_without_end() -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 2**16
            yield bytes(2**16)

    endless_feed = http_feed(lambda _: httpx.Response(200, content=endless()))
    with raises_naming(IntegrityError, "100 bytes"):
        endless_feed.fetch("a" * 64, 100, io.BytesIO())
    with raises_naming(IntegrityError, str(MAX_ENVELOPE_BYTES)):
        endless_feed.current("standard")
    assert sent < 4 * MAX_ENVELOPE_BYTES


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(404),
        httpx.Response(404, text="<html>nginx</html>"),
        httpx.Response(404, json={"detail": "Not Found"}),
        # A control server, whose release has no such variant.
        httpx.Response(404, json=problem_document(NotFoundError("The current release has no variant."))),
    ],
)
def test_http_only_a_control_server_says_that_there_is_no_release_yet(answer: httpx.Response) -> None:
    with pytest.raises(FeedUnavailableError):
        http_feed(lambda _: answer).current("standard")
    assert http_feed(lambda _: NO_RELEASE).current("standard") is None


@pytest.mark.parametrize("status", [301, 401, 500, 503])
def test_http_any_other_status_is_unavailable(status: int) -> None:
    with raises_naming(FeedUnavailableError, str(status)):
        http_feed(lambda _: httpx.Response(status, headers={"location": "http://elsewhere/"})).current("standard")


def test_http_a_missing_artifact_is_not_found() -> None:
    with pytest.raises(NotFoundError):
        http_feed(lambda _: httpx.Response(404)).fetch("a" * 64, 100, io.BytesIO())


def test_http_a_server_that_is_away_is_named() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    with raises_naming(FeedUnavailableError, "http://control:8000"):
        http_feed(away).current("standard")


def test_http_what_is_not_text_is_refused_by_the_client(feed: MemoryFeed, tmp_path: Path) -> None:
    garbled = http_feed(lambda _: httpx.Response(200, content=b"\xff\xfe"))
    client = ReleaseClient(garbled, tmp_path, [feed.key.public_key()], "standard")
    with pytest.raises(IntegrityError):
        client.poll()


@pytest.mark.parametrize("writes", range(4))
def test_a_loss_of_power_at_any_write_leaves_a_usable_cache(
    feed: MemoryFeed, connect: Callable[[], ReleaseClient], monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    feed.offer(OLD, 1)
    assert connect().poll()
    feed.offer(NEW, 2)
    client = connect()
    with monkeypatch.context() as patch:
        _fail_after(patch, writes)
        with pytest.raises(RuntimeError):
            client.poll()
    restarted = connect()
    assert [release.manifest.sequence for release in restarted.cached()][:1] == [1]
    after = restarted.poll()
    assert after is not None
    assert after.model_path.read_bytes() == NEW
    assert [release.manifest.sequence for release in connect().cached()] == [2, 1]


def _fail_after(patch: pytest.MonkeyPatch, writes: int) -> None:
    left = writes
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        nonlocal left
        if left == 0:
            raise RuntimeError("power lost")
        left -= 1
        replace(source, target)

    patch.setattr(os, "replace", failing)


def test_a_client_that_pins_nothing_follows_the_fleet_from_variant_to_variant(feed: MemoryFeed, tmp_path: Path) -> None:
    def follower() -> ReleaseClient:
        return ReleaseClient(feed, tmp_path / "cache", [feed.key.public_key()])

    client = follower()
    feed.offer(OLD, 1, variant="standard")
    assert client.poll()
    feed.offer(NEW, 2, variant="edge_optimized", version="v0.0.1")
    switched = client.poll()
    assert switched is not None
    assert (switched.manifest.variant, switched.model_path.read_bytes()) == ("edge_optimized", NEW)
    assert [r.manifest.variant for r in follower().cached()] == ["edge_optimized", "standard"]
    feed.offer(OLD, 1, variant="standard")
    with pytest.raises(IntegrityError, match="2 was accepted"):
        follower().poll()


def test_another_variant_under_the_same_sequence_is_refused(feed: MemoryFeed, tmp_path: Path) -> None:
    client = ReleaseClient(feed, tmp_path / "cache", [feed.key.public_key()])
    feed.offer(OLD, 1, variant="standard")
    assert client.poll()
    feed.offer(NEW, 1, variant="edge_optimized")
    with pytest.raises(IntegrityError, match="two different releases"):
        client.poll()
