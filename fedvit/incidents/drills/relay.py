"""TCP relay: ``python -m fedvit.incidents.drills.relay LISTEN TARGET``, host:port each.

A vehicle in a network namespace of its own cannot reach the server's loopback address; with one relay on either side
of the cable between them it can, and the server sees it come from this machine.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

CHUNK_BYTES = 65536


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
    with suppress(OSError):
        writer.close()


async def relay(listen: str, target: str) -> None:
    """Carry connections until cancelled."""
    there, _, there_port = target.rpartition(":")

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(there, int(there_port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

    host, _, port = listen.rpartition(":")
    async with await asyncio.start_server(carry, host, int(port)) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(relay(sys.argv[1], sys.argv[2]))
