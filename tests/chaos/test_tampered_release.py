"""A vehicle under load is offered releases that were tampered with: it refuses each and serves on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from load import Load, await_true
from tiny_release import MemoryFeed, manifest_of, png, tiny_model

from fedvit.wire.manifest import public_key_text, sign_manifest


class Server(ThreadingHTTPServer):
    """A control server's two routes for followers, over a feed that lies."""

    def __init__(self, feed: MemoryFeed) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.feed = feed
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        feed, path = self.server.feed, self.path.partition("?")[0]
        is_release = path == "/api/model/release"
        content = (feed.envelope or "").encode() if is_release else feed.blobs.get(path.rsplit("/", 1)[-1])
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    feed = MemoryFeed()
    feed.offer(tiny_model(), 5)
    with Server(feed) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@contextmanager
def edge(server: Server, folder: Path) -> Iterator[str]:
    """A vehicle's process that follows the server; its address."""
    command = [sys.executable, "-m", "edge_runtime", "serve", "--source", server.url, "--port", "0"]
    command += ["--trusted-key", public_key_text(server.feed.key.public_key())]
    command += ["--cache", str(folder / "cache"), "--poll-interval", "0.05"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.communicate()


def flipped_byte(feed: MemoryFeed) -> None:
    content = tiny_model(1.0)
    manifest = feed.offer(content, 6)
    feed.blobs[manifest.artifact_digest] = content[:-1] + bytes([content[-1] ^ 1])


def truncated(feed: MemoryFeed) -> None:
    manifest = feed.offer(tiny_model(1.0), 6)
    feed.blobs[manifest.artifact_digest] = tiny_model(1.0)[:-10]


def foreign_signature(feed: MemoryFeed) -> None:
    content = tiny_model(1.0)
    manifest = feed.offer(content, 6)
    feed.envelope = sign_manifest(manifest, Ed25519PrivateKey.generate())


def changed_after_signing(feed: MemoryFeed) -> None:
    feed.offer(tiny_model(1.0), 6)
    assert feed.envelope is not None
    feed.envelope = feed.envelope.replace("v0.0.6", "v9.9.9")


def replayed(feed: MemoryFeed) -> None:
    feed.offer(tiny_model(1.0), 4)


def no_model(feed: MemoryFeed) -> None:
    feed.offer(b"a pickle, perhaps", 6)


def another_task(feed: MemoryFeed) -> None:
    content = tiny_model(classes=2)
    feed.blobs |= {manifest_of(content).artifact_digest: content}
    feed.offer(content, 6)


Tamper = Callable[[MemoryFeed], None]
REFUSALS: dict[Tamper, str] = {
    flipped_byte: "SHA-256",
    truncated: "bytes",
    foreign_signature: "sign",
    changed_after_signing: "sign",
    replayed: "sequence",
    no_model: "v0.0.6",
    another_task: "v0.0.6",
}


@pytest.mark.parametrize("tamper", REFUSALS, ids=lambda tamper: tamper.__name__)
def test_a_tampered_release_is_refused_and_the_old_one_serves_on(
    server: Server, tmp_path: Path, tamper: Tamper
) -> None:
    with edge(server, tmp_path) as url, httpx.Client(base_url=url, timeout=30) as http:

        def last_error() -> str:
            return str(http.get("/health/detailed").json()["last_error"])

        await_true(lambda: http.get("/health").status_code == 200, "the first model")
        old = ("v0.0.5", "standard")
        with Load({"edge": url}, png()) as load:
            load.settle(old, 0)
            # At once: the vehicle may ask at any moment.
            feed = replace(server.feed, blobs=dict(server.feed.blobs))
            tamper(feed)
            server.feed = feed
            await_true(lambda: REFUSALS[tamper] in last_error(), f"a refusal that says {REFUSALS[tamper]}")
            load.hold(old, answers=3)
            server.feed.offer(tiny_model(2.0), 7)
            load.settle(("v0.0.7", "standard"), 1)
            assert last_error() == "None"
        assert {answer.fault for answer in load.answers} == {None}
        assert {answer.key for answer in load.answers} == {old, ("v0.0.7", "standard")}
