"""Attacks on the control API by slow peers, by floods of lines, and by pages of other origins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from fastapi import Response
from scoped_api import DEVICE, ScopedApi

import edge_runtime.connections as connections
import serve_apps.control.http.route as route_module
from fedvit.api.inbound import BodyLimits
from serve_apps.control.http.access import FOLLOWER
from serve_apps.control.http.audit import LINES_AT_ONCE
from tests.attack.conftest import FULL
from tests.attack.control_target import RunningSystem, ServedApi, Target
from tests.attack.slow_peers import SlowPeer, SlowPeers, latencies_s, p95
from tests.attack.table import AttackTable

SUBJECT = "control API"
OPERATOR_S, HEALTH_S = 1.0, 0.1
# Whoever comes back without a token that counts cannot be told from a load balancer; each refusal costs its share.
HEALTH_IN_FLOOD_S = 1.0
# In the short form other tests use the machine at the same time; without admission control it takes ten times as long.
LOOSER = 5.0
MB = 2**20
MAX_UNREAD = 40 * MB
SHORT_S = 1.0
ENDED_S = 60.0
CHUNKED = (
    f"POST /api/clients/{DEVICE}/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer TOKEN\r\n"
    "Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.fixture(scope="module")
def target(full: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    home = tmp_path_factory.mktemp("home")
    built = RunningSystem(home) if full else ServedApi(home, MAX_UNREAD)
    yield built
    built.close()


@pytest.fixture
def served_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedApi]:
    """The API in this process, with deadlines of one second, so that they pass during a test."""
    monkeypatch.setattr(connections, "HEAD_S", SHORT_S)
    monkeypatch.setattr(connections, "STALL_S", SHORT_S)
    monkeypatch.setattr(route_module, "BodyLimits", partial(BodyLimits, grace_s=SHORT_S))
    built = ServedApi(tmp_path, MAX_UNREAD)
    yield built
    built.close()


def slow_uploads(target: Target) -> list[SlowPeer]:
    head = target.request(f"PUT /api/clients/{DEVICE}/updates/run-0001/1", target.device, f"Content-Length: {64 * MB}")
    return [SlowPeer(head, b"\0", returns=True)] * 80


def half_sent(target: Target) -> list[SlowPeer]:
    place = f"POST /api/clients/{DEVICE}/heartbeat"
    return [SlowPeer(target.request(place, target.device, "Content-Length: 1000", body=b"{"), returns=True)] * 100


def slow_connections(target: Target) -> list[SlowPeer]:
    """Every way to be slow; whoever is refused comes back."""
    place, chunked = f"POST /api/clients/{DEVICE}/heartbeat", "Transfer-Encoding: chunked"
    ways = [
        SlowPeer(target.request(place, target.device, chunked), b"1\r\n \r\n", returns=True),
        *slow_uploads(target)[:1],
        *half_sent(target)[:1],
        SlowPeer(target.request("GET /api/model/release", target.device, "Content-Length: 100"), b" ", returns=True),
        SlowPeer(target.request("POST /api/clients/register", target.device, chunked), returns=True),
        SlowPeer(f"GET /healthz HTTP/1.1\r\nAuthorization: Bearer {target.device}\r\nX: ".encode(), b"a", returns=True),
        SlowPeer(b"", returns=True),
        SlowPeer(b"POST /", b"a", returns=True),
    ]
    return ways * 25


def without_tokens(target: Target) -> list[SlowPeer]:
    bad = f"fvt_{'0' * 12}_{'A' * 43}"
    heads = [target.request("POST /api/clients/register", token, "Content-Length: 1000") for token in (None, bad)]
    return [SlowPeer(head, b" ", returns=True) for head in heads] * 100


def half_sent_images(target: Target) -> list[SlowPeer]:
    head = target.request("POST /inference/infer", target.device, "Content-Length: 1000", body=b"\x89PNG")
    return [SlowPeer(head, returns=True)] * 100


ATTACKS: dict[str, Callable[[Target], list[SlowPeer]]] = {
    "80 slow uploads of one device token": slow_uploads,
    "100 half-sent bodies of one device token": half_sent,
    "200 slow connections of one device token, in eight ways": slow_connections,
    "200 half-sent bodies with bad tokens and without one": without_tokens,
}
if FULL:
    # The inference application listens behind the same proxy.
    ATTACKS["100 half-sent images of one device token"] = half_sent_images


@pytest.mark.parametrize("attack", ATTACKS)
def test_operators_are_answered_during_an_attack(
    target: Target, attack_table: AttackTable, full: bool, attack: str
) -> None:
    seconds = 20.0 if full else 2.0
    read = target.request("GET /api/clients/status", target.operator)
    health = target.request("GET /healthz")
    latencies_s(target.port, read, 0.2)
    before_mb = target.memory_mb()
    peers = ATTACKS[attack](target)
    with SlowPeers(target.port, peers) as attackers, ThreadPoolExecutor(2) as pool:
        reads = pool.submit(latencies_s, target.port, read, seconds)
        pings = pool.submit(latencies_s, target.port, health, seconds)
        read_s, health_s = p95(reads.result()), p95(pings.result())
        assert attackers.open + attackers.statuses.total() >= len(peers)
    grown_mb = target.memory_mb() - before_mb
    factor = 1.0 if full else LOOSER
    bound_s = HEALTH_IN_FLOOD_S if ATTACKS[attack] is without_tokens else HEALTH_S
    assert read_s <= factor * OPERATOR_S
    assert health_s <= factor * bound_s
    assert grown_mb < 200
    memory = f", memory +{grown_mb:.0f} MB" if full else ""
    attack_table.add(
        SUBJECT,
        f"{attack}; they come back when refused ({target.form})",
        achieved=f"operator's read {1000 * read_s:.0f} ms, /healthz {1000 * health_s:.0f} ms (p95){memory}",
        bound=f"operator's read {OPERATOR_S:g} s, /healthz {1000 * bound_s:.0f} ms (p95), memory +200 MB",
    )


def test_one_token_is_refused_beyond_its_limit_and_its_slow_bodies_are_given_up(
    served_api: ServedApi, attack_table: AttackTable
) -> None:
    peers = [SlowPeer(peer.head, peer.drip) for peer in half_sent(served_api)]
    limit = served_api.site.settings.access.max_requests_per_caller
    with SlowPeers(served_api.port, peers) as attackers:
        attackers.await_all(lambda: len(attackers.held_s) == len(peers), ENDED_S)
        assert attackers.statuses[408] <= limit
        assert attackers.statuses == {429: len(peers) - attackers.statuses[408], 408: attackers.statuses[408]}
        longest_s = max(attackers.held_s)
    assert longest_s < ENDED_S / 2
    attack_table.add(
        SUBJECT,
        f"100 half-sent bodies of one token, {SHORT_S:g} s of grace",
        achieved=f"{attackers.statuses[408]} were waited for, the longest {longest_s:.1f} s; 429 for the others",
        bound=f"{limit} at once, given up after the grace",
    )


def test_slow_headers_and_idle_connections_are_ended(served_api: ServedApi, attack_table: AttackTable) -> None:
    heads = (b"", b"GET", b"GET /healthz HTTP/1.1\r\nX: ", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /")
    peers = [SlowPeer(head, b"a", every_s=0.1) for head in heads] * 50
    with SlowPeers(served_api.port, peers) as attackers:
        attackers.await_all(lambda: len(attackers.held_s) == len(peers), ENDED_S)
        longest_s = max(attackers.held_s)
    assert longest_s < ENDED_S / 2
    attack_table.add(
        SUBJECT,
        f"200 connections with slow headers or none, {SHORT_S:g} s allowed",
        achieved=f"all ended, the last after {longest_s:.1f} s",
        bound="ended after the time allowed",
    )


@pytest.mark.parametrize(
    ("name", "begins", "flood"),
    [
        ("a header", "GET /healthz HTTP/1.1\r\nX: ", b"a"),
        ("headers", "GET /healthz HTTP/1.1\r\n", b"X: a\r\n"),
        ("a path", "GET /", b"a"),
        ("trailers", f"{CHUNKED}0\r\n", b"X: a\r\n"),
        ("trailers after the response", f"{CHUNKED}0\r\n".replace("Bearer", ""), b"X: a\r\n"),
        ("a chunk extension", f"{CHUNKED}1", b";a=b"),
    ],
)
def test_endless_headers_are_broken_off(
    served_api: ServedApi, attack_table: AttackTable, name: str, begins: str, flood: bytes
) -> None:
    head = begins.replace("TOKEN", served_api.device).encode()
    with SlowPeers(served_api.port, [SlowPeer(head + flood * (64 * MB // len(flood)))]) as attackers:
        attackers.await_all(lambda: len(attackers.held_s) == 1, ENDED_S)
    # What lies in the buffers of the two sockets counts as sent.
    assert attackers.sent < 16 * MB
    attack_table.add(
        SUBJECT,
        f"{name} without end",
        achieved=f"{attackers.sent / MB:.1f} MB sent before the connection broke",
        bound="16 MB with the buffers of the sockets",
    )


def test_a_body_is_refused_before_it_is_read(served_api: ServedApi, attack_table: AttackTable) -> None:
    place = f"/api/clients/{DEVICE}/updates/run-0001/1"
    length, device = f"Content-Length: {64 * MB}", served_api.device
    requests = {
        401: served_api.request(f"PUT {place}", "fvt_no", length),
        403: served_api.request(f"PUT {place.replace(DEVICE, 'other')}", device, length),
        404: served_api.request(f"PUT {place}", device, length),
        413: served_api.request(f"PUT {place}", device, f"Content-Length: {64 * MB + 1}"),
        415: served_api.request(f"PUT {place}", device, length, "Content-Encoding: gzip"),
    }
    for status, head in requests.items():
        began_s = time.monotonic()
        with SlowPeers(served_api.port, [SlowPeer(head)]) as attacker:
            attacker.await_all(lambda answered=attacker.statuses: bool(answered), ENDED_S)  # type: ignore[misc]
            assert attacker.statuses == {status: 1}
            assert time.monotonic() - began_s < SHORT_S
    attack_table.add(
        SUBJECT,
        "64 MB announced with a bad token, for another client, without a task, too long, compressed",
        achieved="401, 403, 404, 413, 415 without a byte of the body",
        bound="refused before the body",
    )


def test_responses_that_nobody_reads_are_bounded(served_api: ServedApi, attack_table: AttackTable) -> None:
    @served_api.site.api.get("/api/artifact", dependencies=FOLLOWER)
    def artifact() -> Response:
        return Response(bytes(16 * MB))

    peers = [SlowPeer(served_api.request("GET /api/artifact", served_api.releases), ignores=True)] * 40
    with SlowPeers(served_api.port, peers) as attackers:
        attackers.await_all(lambda: attackers.statuses.total() == len(peers), ENDED_S)
        served = attackers.statuses[200]
        # Those that got an answer are ended, too: they do not read it.
        assert attackers.statuses[200] + attackers.statuses[503] + attackers.statuses[429] == len(peers)
    assert 0 < served * 16 * MB <= MAX_UNREAD
    attack_table.add(
        SUBJECT,
        "40 downloads of 16 MB that are not read, with one token",
        achieved=f"{served * 16} MB wait in memory; 429 or 503 for the others",
        bound=f"{MAX_UNREAD / MB:.0f} MB",
    )


def test_a_device_cannot_fill_the_audit_trail_nor_the_store(
    tmp_path: Path, attack_table: AttackTable, full: bool
) -> None:
    calls = 400 if full else 2 * LINES_AT_ONCE
    with ScopedApi(tmp_path, mode="tokens", requests_per_s=1e6, burst=10**6) as site:
        database = site.store.home / "state.db-wal"
        before = database.stat().st_size
        for number in range(calls):
            body, key = {"device_id": DEVICE, "num_examples": 1 + number % 2}, {"Idempotency-Key": f"k-{number}"}
            site.ask("POST", "/api/clients/register", "device", json=body, headers=key)
            site.ask("POST", "/api/training/stop", "device")
        lines = len(site.store.audit.entries())
        assert site.ask("POST", "/api/training/stop", "operator").status_code == 202
        last = site.store.audit.latest(1)[0].facts
        grown = database.stat().st_size - before
    assert lines <= LINES_AT_ONCE
    assert last.scopes == ("operator",)
    attack_table.add(
        SUBJECT,
        f"{calls} registrations and {calls} refused calls of one device, each with a key of its own",
        achieved=f"{lines} lines of the audit trail, {grown / MB:.1f} MB of the store's log",
        bound=f"{LINES_AT_ONCE} lines, then one a minute; an operator's line is never merged",
    )
