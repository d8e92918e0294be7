"""Attacks on inference processes, of vehicles and of the server, by half-sent images and by pages of other origins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from scoped_api import scoped_token
from starlette.middleware import Middleware
from tiny_release import MemoryFeed, png, tiny_model

import edge_runtime.server as server_module
from edge_runtime.access import access_rules
from edge_runtime.server import ServingOptions, ServingProcess
from fedvit.access.identity import Scope
from fedvit.registry.client import ReleaseClient
from fedvit.settings import load_settings
from fedvit.store.store import Store
from serve_apps.control.http.access import Guard
from serve_apps.control.http.admission import Admission
from serve_apps.inference.access import InferenceGuard
from tests.attack.control_target import served
from tests.attack.slow_peers import HOST, SlowPeer, SlowPeers, latencies_s, p95
from tests.attack.table import AttackTable

BOUND_S = 1.0
# In the short form other tests use the machine at the same time.
LOOSER = 5.0
PEERS = 100


class Inference:
    """A served process with a tiny model; ``attacker`` and ``user`` are lines of headers."""

    def __init__(self, stack: ExitStack, home: Path, rules: Sequence[Middleware]) -> None:
        feed = MemoryFeed()
        feed.offer(tiny_model(), 1)
        client = ReleaseClient(feed, home / "cache", [feed.key.public_key()], "standard")
        process = ServingProcess(client, ServingOptions("edge-7", "memory", poll_interval_s=3600))
        process.service.refresh()
        self.port = stack.enter_context(served(process.app(*rules)))
        self.attacker = self.user = ""

    def request(self, line: str, *headers: str, body: bytes = b"", length: int | None = None) -> bytes:
        host = [] if any(header.startswith("Host:") for header in headers) else [f"Host: {HOST}:{self.port}"]
        lines = [f"{line} HTTP/1.1", *host, "Connection: close", *filter(None, headers)]
        return "\r\n".join([*lines, f"Content-Length: {length or len(body)}", "", ""]).encode() + body


def edge(stack: ExitStack, home: Path) -> Inference:
    return Inference(stack, home, access_rules(HOST, None))


def replica(stack: ExitStack, home: Path) -> Inference:
    settings = load_settings(environ={}, overrides={"home": home, "access": {"mode": "tokens"}})
    store = stack.enter_context(Store.open(home))
    rules = Middleware(InferenceGuard, guard=Guard(settings, store), admission=Admission(settings.access))
    result = Inference(stack, home, [rules])
    result.attacker = f"Authorization: Bearer {scoped_token(store, Scope.DEVICE)}"
    result.user = f"Authorization: Bearer {scoped_token(store, Scope.VIEWER)}"
    return result


@pytest.fixture(params=[edge, replica], ids=["edge", "replica"])
def inference(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Inference]:
    make: Callable[[ExitStack, Path], Inference] = request.param
    with ExitStack() as stack:
        yield make(stack, tmp_path)


def test_images_that_never_come_take_nobodys_place(
    inference: Inference, attack_table: AttackTable, full: bool, request: pytest.FixtureRequest
) -> None:
    infer = inference.request("POST /infer", inference.user, body=png())
    head = inference.request("POST /infer", inference.attacker, length=1000, body=b"\x89PNG")
    latencies_s(inference.port, infer, 0.2)
    with SlowPeers(inference.port, [SlowPeer(head, returns=True)] * PEERS):
        # Every answer is a prediction, or this fails.
        infer_s = p95(latencies_s(inference.port, infer, 10.0 if full else 1.0))
        health_s = p95(latencies_s(inference.port, inference.request("GET /health"), 2.0 if full else 0.5))
    assert max(infer_s, health_s) <= (1.0 if full else LOOSER) * BOUND_S
    kind = "edge process" if inference.user == "" else "inference replica, one device token"
    attack_table.add(
        "inference",
        f"{PEERS} half-sent images to an {kind}",
        achieved=f"every other image is answered, {1000 * infer_s:.0f} ms (p95); /health {1000 * health_s:.0f} ms",
        bound=f"{BOUND_S:g} s (p95)",
    )


def test_a_body_that_stops_is_given_up(
    inference: Inference, attack_table: AttackTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "BODY_GRACE_S", 0.5)
    head = inference.request("POST /infer", inference.attacker, length=1000, body=b"\x89PNG")
    with SlowPeers(inference.port, [SlowPeer(head)] * 8) as peers:
        peers.await_all(lambda: len(peers.held_s) == 8, 30.0)
        assert peers.statuses == {408: 8}


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (None, "http://localhost:3000"),
        (None, f"http://{HOST}:3000"),
        (None, "https://evil.example"),
        (None, "null"),
        ("evil.example", "http://evil.example"),
        ("evil.example", None),
    ],
)
def test_a_page_of_another_origin_is_refused(
    attack_table: AttackTable, tmp_path: Path, host: str | None, origin: str | None
) -> None:
    with ExitStack() as stack:
        target = edge(stack, tmp_path)
        headers = [f"Host: {host}"] if host else []
        headers += [f"Origin: {origin}"] if origin else []
        for line in ("POST /infer", "GET /health/detailed", "GET /metrics"):
            with SlowPeers(target.port, [SlowPeer(target.request(line, *headers, body=png()))]) as peers:
                peers.await_all(lambda answered=peers.statuses: bool(answered), 30.0)  # type: ignore[misc]
                assert peers.statuses == {403: 1}
    attack_table.add(
        "inference",
        f"a page: Origin {origin}, Host {host or 'of the edge process'}",
        achieved="403",
        bound="403",
    )
