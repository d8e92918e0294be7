"""Slow HTTP peers: connections that send little or nothing, and what a server did with them; and a stopwatch."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

HOST = "127.0.0.1"
CONNECT_S = 10.0
RETURN_S = 1.0
_STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ")


@dataclass(frozen=True, slots=True)
class SlowPeer:
    """One connection: it sends ``head`` at once and ``drip`` every ``every_s``, and never reads if it ``ignores``.

    ``returns`` connects again whenever the server has hung up, after about :data:`RETURN_S`.
    """

    head: bytes
    drip: bytes = b""
    every_s: float = 0.5
    returns: bool = False
    ignores: bool = False


@dataclass
class SlowPeers:
    """Peers on a thread of their own, for as long as the block runs.

    Attributes:
        statuses: how often the server answered with each status.
        held_s: how long each connection lasted that the server ended.
        open: how many connections are open.
        sent: bytes that the server has accepted.
    """

    port: int
    peers: Sequence[SlowPeer]
    statuses: Counter[int] = field(default_factory=Counter)
    held_s: list[float] = field(default_factory=list)
    open: int = 0
    sent: int = 0

    def __enter__(self) -> SlowPeers:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def await_all(self, reached: Callable[[], bool], limit_s: float) -> float:
        """Wait until ``reached``; return the seconds that it took."""
        began_s = time.monotonic()
        while not reached():
            assert time.monotonic() - began_s < limit_s, (self.statuses, self.open, len(self.held_s))
            time.sleep(0.02)
        return time.monotonic() - began_s

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        tasks = [asyncio.create_task(self._play(peer)) for peer in self.peers]
        while self.open < len(self.peers) and not self.held_s and not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)
        self._ready.set()
        await self._stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _play(self, peer: SlowPeer) -> None:
        while not self._stop.is_set():
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(HOST, self.port, limit=4096 if peer.ignores else 2**16), CONNECT_S
            )
            self.open += 1
            began_s = time.monotonic()
            try:
                await self._send(peer, reader, writer)
            finally:
                self.open -= 1
                writer.transport.abort()
            self.held_s.append(time.monotonic() - began_s)
            if not peer.returns:
                return
            await asyncio.sleep(RETURN_S * random.uniform(0.5, 1.5))

    async def _send(self, peer: SlowPeer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the server hangs up."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._write(writer, peer.head)
            answer = b""
            # wait_for may swallow the cancellation.
            while not self._stop.is_set():
                try:
                    received = await asyncio.wait_for(reader.read(64 if peer.ignores else 65536), peer.every_s)
                except TimeoutError:
                    await self._write(writer, peer.drip)
                    continue
                if not received:
                    return
                if not _STATUS.match(answer) and (status := _STATUS.match(answer := (answer + received)[:64])):
                    self.statuses[int(status[1])] += 1
                if peer.ignores:
                    await asyncio.sleep(3600)

    async def _write(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        for start in range(0, len(content), 65536):
            writer.write(content[start : start + 65536])
            await writer.drain()
            self.sent += len(content[start : start + 65536])


def latencies_s(port: int, request: bytes, seconds: float, pause_s: float = 0.02) -> list[float]:
    """How long each of the requests took that were sent one after another, over a connection each."""
    results, end_s = [], time.monotonic() + seconds
    while time.monotonic() < end_s:
        began_s = time.monotonic()
        with socket.create_connection((HOST, port), timeout=120) as connection:
            connection.sendall(request)
            answer = b""
            while received := connection.recv(65536):
                answer += received
        results.append(time.monotonic() - began_s)
        assert answer.startswith(b"HTTP/1.1 200 "), answer[:500]
        time.sleep(pause_s)
    return results


def p95(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]
