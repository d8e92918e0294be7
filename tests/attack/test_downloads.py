"""Attacks of a hostile server on every client: bombs, bodies without end, drips, lies about lengths, redirects."""

from __future__ import annotations

import contextlib
import io
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from certificate import self_signed

import edge_runtime.heartbeat as heartbeat_module
import fedvit.api.transport as transport
import fedvit.tools.report.probe as probe_module
from edge_runtime.heartbeat import HeartbeatChannel, HeartbeatLoop
from edge_runtime.mailbox import MailboxSender
from fedvit.api.transport import exchange, json_of, open_http
from fedvit.client import FedvitClient
from fedvit.client.caller import MAX_ANSWER_BYTES
from fedvit.errors import FedvitError, IntegrityError
from fedvit.registry.feed import HttpFeed
from fedvit.tools.report.probe import Target, probe
from fedvit.wire.folders import open_folder
from tests.attack.hostile_server import BEHAVIOURS, BOMB_MB, HostileServer
from tests.attack.table import AttackTable

SUBJECT = "clients of a hostile server"
MB = 2**20
ARTIFACT_BYTES = 100_000
UPLOAD_BYTES = 8 * MB
MAX_MEMORY = 3 * MAX_ANSWER_BYTES
"""Of the largest response that is read: its growing buffer, and the copy that is handed on."""


@dataclass(frozen=True)
class Limits:
    """Seconds: between two bytes of a slow server, of a client's calls, and of the grace for a body."""

    drip_s: float
    timeout_s: float
    grace_s: float


@pytest.fixture
def limits(full: bool, monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Those of service, and a server that sends a byte every two seconds; in the short form all is faster."""
    if full:
        return Limits(2.0, 10.0, transport.GRACE_S)
    monkeypatch.setattr(transport, "GRACE_S", 0.15)
    monkeypatch.setattr(heartbeat_module, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(probe_module, "REQUEST_TIMEOUT_S", 0.3)
    return Limits(0.05, 0.3, 0.15)


def feed(url: str, limits: Limits, home: Path) -> object:
    return HttpFeed(url, limits.timeout_s).current(None)


def artifact(url: str, limits: Limits, home: Path) -> object:
    received = io.BytesIO()
    HttpFeed(url, limits.timeout_s).fetch("a" * 64, ARTIFACT_BYTES, received)
    return received.getvalue()


def api_call(url: str, limits: Limits, home: Path) -> object:
    with FedvitClient(url, timeout_s=limits.timeout_s) as client:
        return client.training.status()


def task_weights(url: str, limits: Limits, home: Path) -> object:
    with FedvitClient(url, timeout_s=limits.timeout_s) as client:
        return client.clients.task_weights("truck-7", ARTIFACT_BYTES)


def upload(url: str, limits: Limits, home: Path) -> object:
    with FedvitClient(url, timeout_s=limits.timeout_s) as client:
        return client.clients.upload("truck-7", "run-0001", 1, bytes(UPLOAD_BYTES))


def heartbeat(url: str, limits: Limits, home: Path) -> object:
    sender = MailboxSender(open_folder(str(home)), "truck-7", bytes(32))
    with open_http(url, timeout_s=limits.timeout_s) as http:
        return HeartbeatLoop(http, "truck-7", dict, sender).beat()


def image_probe(url: str, limits: Limits, home: Path) -> object:
    return probe(Target(url), [b"image"])


def health(url: str, limits: Limits, home: Path) -> object:
    return json_of(Target(url).health("/health", limits.timeout_s))["status"]


CLIENTS: dict[str, Callable[[str, Limits, Path], object]] = {
    "release feed": feed,
    "artifact": artifact,
    "API call": api_call,
    "task weights": task_weights,
    "upload": upload,
    "heartbeat": heartbeat,
    "probe": image_probe,
    "health check": health,
}
REFUSED = (FedvitError, httpx.HTTPError, ValueError, TypeError)
# What these return is judged by who asked: a manifest has no good signature, weights no good hash.
UNVERIFIED = {feed, artifact, task_weights}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_hostile_server_gets_neither_memory_nor_time(
    attack_table: AttackTable, limits: Limits, tmp_path: Path, name: str
) -> None:
    call = CLIENTS[name]
    # A probe waits longer than other clients. Some seconds more on a busy machine.
    timeout_s = probe_module.REQUEST_TIMEOUT_S if call is image_probe else limits.timeout_s + limits.grace_s
    allowed_s = timeout_s + 5.0
    longest, largest = (0.0, ""), (0, "")
    for attack, behaviour in BEHAVIOURS.items():
        with (
            HostileServer(BEHAVIOURS["deep JSON"], limits.drip_s) as other,
            HostileServer(behaviour, limits.drip_s, elsewhere=other.url) as server,
        ):
            tracemalloc.start()
            began_s = time.monotonic()
            try:
                result = call(server.url, limits, tmp_path)
            except REFUSED as error:
                result = error
            seconds = time.monotonic() - began_s
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert other.connections == 0, attack
            assert server.sent <= MAX_ANSWER_BYTES + 16 * MB, attack
        refused = isinstance(result, REFUSED) or result is HeartbeatChannel.MAILBOX
        assert refused or call in UNVERIFIED or call is heartbeat, (attack, result)
        assert seconds < allowed_s, attack
        longest, largest = max(longest, (seconds, attack)), max(largest, (peak, attack))
    assert largest[0] < MAX_MEMORY, largest
    attack_table.add(
        SUBJECT,
        f"{name}: {len(BEHAVIOURS)} behaviours, bombs of {BOMB_MB} MB, a byte every {limits.drip_s:g} s",
        achieved=f"given up after {longest[0]:.1f} s at most ({longest[1]}), {largest[0] / MB:.0f} MB ({largest[1]})",
        bound=f"{allowed_s:.0f} s, {MAX_MEMORY / MB:.0f} MB",
    )


@pytest.mark.parametrize("attack", [name for name in BEHAVIOURS if "bomb" in name or name in ("br", "zstd")])
def test_no_bomb_is_opened(attack: str, limits: Limits) -> None:
    """Far below what it holds: the bytes that came over the line, and no more."""
    with HostileServer(BEHAVIOURS[attack], limits.drip_s) as server, open_http(server.url, timeout_s=5) as http:
        request = http.build_request("GET", "/")
        assert request.headers["accept-encoding"] == "identity"
        exchange_quietly(http, request)
        tracemalloc.start()
        exchange_quietly(http, http.build_request("GET", "/"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * MB


def exchange_quietly(http: httpx.Client, request: httpx.Request) -> None:
    with contextlib.suppress(IntegrityError):
        assert exchange(http, request, max_bytes=MB, deadline_s=20).text == ""


def test_cookies_are_not_kept(limits: Limits) -> None:
    with HostileServer(BEHAVIOURS["cookies"], limits.drip_s) as server, open_http(server.url, timeout_s=5) as http:
        for _ in range(3):
            response = exchange(http, http.build_request("GET", "/"), max_bytes=10, deadline_s=20)
            assert response.headers["set-cookie"]
        assert "cookie" not in http.build_request("GET", "/").headers
        assert len(http.cookies) == 0


@pytest.mark.parametrize("attack", ["body of one byte at a time", "headers of one byte at a time", "silence"])
def test_a_deadline_holds_under_tls(limits: Limits, tmp_path: Path, attack: str) -> None:
    certificate = self_signed(tmp_path)
    with HostileServer(BEHAVIOURS[attack], limits.drip_s, certificate) as server:
        began_s = time.monotonic()
        with pytest.raises(FedvitError):
            HttpFeed(server.url, limits.timeout_s, ca_file=certificate).current(None)
        assert time.monotonic() - began_s < limits.timeout_s + 5.0
