"""A small load generator, a process of its own: keep-alive connections, raw sockets, asyncio.

``python -m tests.benchmarks.http_load HOST PORT REQUESTS``, where REQUESTS is a JSON file of {"requests": [text, ...],
"connections", "seconds", "per_s"}. Each request is sent byte for byte, in turn, over and over; with ``per_s`` at that
rate whatever the server does (open loop), else each connection asks again at once. Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STATUS = slice(9, 12)


@dataclass
class Tally:
    """What came of the requests."""

    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        cuts = statistics.quantiles(self.times_ms, n=100) if len(self.times_ms) > 1 else [0.0] * 99
        return {
            "requests": len(self.times_ms) + len(self.errors),
            "errors": len(self.errors),
            "first_errors": self.errors[:3],
            "per_s": round(len(self.times_ms) / self.seconds, 1),
            "p50_ms": round(cuts[49], 2),
            "p99_ms": round(cuts[98], 2),
        }


class Connection:
    """One keep-alive connection, opened again when it broke."""

    def __init__(self, host: str, port: int, tally: Tally) -> None:
        self._place, self._tally = (host, port), tally
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes, began_s: float) -> None:
        """Send one request and note its answer; ``began_s`` is when it was due."""
        try:
            self._streams = self._streams or await asyncio.open_connection(*self._place)
            reader, writer = self._streams
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            body = await reader.readexactly(int(length[1])) if length else b""
        except (OSError, asyncio.IncompleteReadError) as error:
            self._streams = None
            self._tally.errors.append(repr(error))
            return
        if head[_STATUS] != b"200" or length is None:
            self._tally.errors.append((head + body)[:300].decode(errors="replace"))
            return
        self._tally.times_ms.append(1000 * (time.perf_counter() - began_s))


async def _closed(connections: Sequence[Connection], requests: Iterator[bytes], seconds: float) -> None:
    end_s = time.perf_counter() + seconds

    async def ask_on(connection: Connection) -> None:
        while (now_s := time.perf_counter()) < end_s:
            await connection.ask(next(requests), now_s)

    await asyncio.gather(*map(ask_on, connections))


async def _open(connections: Sequence[Connection], requests: Iterator[bytes], seconds: float, per_s: float) -> None:
    """A request that is due and finds no free connection waits, and its wait counts."""
    due: asyncio.Queue[tuple[bytes, float] | None] = asyncio.Queue()

    async def ask_on(connection: Connection) -> None:
        while (item := await due.get()) is not None:
            await connection.ask(*item)

    asking = [asyncio.create_task(ask_on(connection)) for connection in connections]
    began_s = time.perf_counter()
    for number in range(int(seconds * per_s)):
        due_s = began_s + number / per_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        due.put_nowait((next(requests), due_s))
    for _ in connections:
        due.put_nowait(None)
    await asyncio.gather(*asking)


async def _main(host: str, port: int, plan: dict[str, Any]) -> Tally:
    tally = Tally()
    connections = [Connection(host, port, tally) for _ in range(plan["connections"])]
    requests = itertools.cycle([text.encode() for text in plan["requests"]])
    began_s = time.perf_counter()
    if plan["per_s"]:
        await _open(connections, requests, plan["seconds"], plan["per_s"])
    else:
        await _closed(connections, requests, plan["seconds"])
    tally.seconds = time.perf_counter() - began_s
    return tally


@dataclass(frozen=True)
class Plan:
    """What one run of the generator sends."""

    requests: Sequence[str]
    connections: int
    seconds: float
    per_s: float | None = None


def run_load(host: str, port: int, plan: Plan) -> dict[str, Any]:
    """Run the generator as a process of its own, to its end; what :meth:`Tally.figures` tells."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(plan), file)
        file.flush()
        command = [sys.executable, "-m", "tests.benchmarks.http_load", host, str(port), file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=plan.seconds * 3 + 60)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


if __name__ == "__main__":
    print(
        json.dumps(
            asyncio.run(_main(sys.argv[1], int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))).figures()
        )
    )
