"""Child processes of drills: ``python -m fedvit.incidents.drills.children relay|heartbeats ...``."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from fedvit.errors import FedvitError

CHUNK_BYTES = 65536


def send_heartbeats(url: str, interval_s: float, names: Sequence[str]) -> None:
    """Send heartbeats for vehicles that do nothing else, endlessly; errors of the connection are ignored."""
    from fedvit.client import FedvitClient

    while True:
        with FedvitClient(url) as client, suppress(FedvitError):
            for name in names:
                client.clients.heartbeat(name)
        time.sleep(interval_s)


async def relay(listen: str, target: str) -> None:
    """Forward TCP connections from one host:port to another until cancelled.

    A vehicle in its own network namespace cannot reach the server's loopback address. It can with one relay at each end
    of the link, and the server sees the connection come from this machine.
    """
    target_host, _, target_port = target.rpartition(":")

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(target_host, int(target_port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))

    host, _, port = listen.rpartition(":")
    async with await asyncio.start_server(forward, host, int(port)) as server:
        await server.serve_forever()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
    with suppress(OSError):
        writer.close()


if __name__ == "__main__":
    program, *words = sys.argv[1:]
    if program == "relay":
        asyncio.run(relay(*words))
    else:
        send_heartbeats(words[0], float(words[1]), words[2:])
