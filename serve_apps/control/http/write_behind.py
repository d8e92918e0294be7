"""Write-behind buffers: telemetry and counters are kept in memory and written about once a second."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Protocol

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

FLUSH_EVERY_S = 1.0
_LOG = logging.getLogger("fedvit.control")


class Buffer(Protocol):
    """Something that is written from time to time."""

    def flush(self, *, last: bool = False) -> None:
        """Write what is due; everything where this is the ``last`` call."""


class WriteBehind:
    """The newest moment of each name since the last flush. What a killed process had not written is lost.

    The caller of :meth:`put` bounds the number of names.

    Args:
        write: stores moments by name in one transaction.
    """

    def __init__(self, write: Callable[[Mapping[str, datetime]], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._pending: dict[str, datetime] = {}

    @property
    def pending(self) -> int:
        """How many names wait for the next flush."""
        return len(self._pending)

    def put(self, name: str, at: datetime) -> None:
        """Remember a moment until the next flush."""
        with self._lock:
            self._pending[name] = at

    def flush(self, *, last: bool = False) -> None:
        """Write what is pending; what could not be written stays pending, and the log says why."""
        with self._lock:
            batch, self._pending = self._pending, {}
        if not batch:
            return
        try:
            self._write(batch)
        except Exception:  # Whatever the fault, the next flush tries again.
            _LOG.exception("%d moments could not be written; they are kept", len(batch))
            with self._lock:
                self._pending = batch | self._pending


def flushing(*buffers: Buffer) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """An application's lifespan: a thread flushes the buffers about once a second, and a last time at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=_flush_until, args=(stop, buffers), name="write-behind", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            await run_in_threadpool(thread.join)

    return lifespan


def _flush_until(stop: threading.Event, buffers: tuple[Buffer, ...]) -> None:
    stopped = False
    while not stopped:
        stopped = stop.wait(FLUSH_EVERY_S)
        for buffer in buffers:
            try:
                buffer.flush(last=stopped)
            except Exception:  # One that fails must not keep the others from being written.
                _LOG.exception("a buffer could not be written")
