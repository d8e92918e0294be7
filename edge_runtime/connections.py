"""uvicorn's HTTP protocol with limits on slow peers: headers in time and of bounded size, responses that are read.

uvicorn itself waits without end for a request's headers, and for a peer to read its response.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_S = 10.0
"""Seconds for the headers of a request, from the connection or from their first byte."""
MAX_HEAD_BYTES = 64 * 1024
STALL_S = 60.0
"""Seconds within which a peer must read enough of a response for more of it to be sent."""
LINGER_S = 1.0
"""Seconds for which the rest of a request is still read after its response, which may be lost otherwise."""

# uvicorn chooses the parser: httptools where it is installed, else h11, which limits the size of headers itself.
_UNBOUNDED_HEAD = hasattr(AutoHTTPProtocol, "on_body")


class BoundedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """One connection; give it to :class:`uvicorn.Config` as ``http``."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._counted: Any = None
        self._received = self._body = 0
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all timers."""
        self._forget_head()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hand bytes to the parser; break the connection off where headers are late or too long."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not self._counted:
            # Of this chunk an unknown part belongs to the request before.
            self._counted, self._received, self._body = cycle, 0, 0
        else:
            self._received += len(data)
        if cycle is None or (cycle.response_complete and not cycle.more_body):
            self._await_head()
        else:
            self._forget_head()
        # A body has at most six bytes of framing for each of its own; the rest are headers, trailers and extensions.
        if _UNBOUNDED_HEAD and self._received - 8 * self._body > MAX_HEAD_BYTES:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        """Count the bytes of the body; called by httptools only."""
        self._body += len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Close a connection soon whose request goes on after its response."""
        super().on_response_complete()
        self._counted, self._received, self._body = self.cycle, 0, 0
        if self.cycle.response_complete and self.cycle.more_body:
            self.loop.call_later(LINGER_S, self._end, self.cycle)

    def pause_writing(self) -> None:
        """Give the peer :data:`STALL_S` to read."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The peer has read."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEAD_S, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _end(self, cycle: Any) -> None:
        if self.cycle is cycle and not self.transport.is_closing():
            self.transport.close()
