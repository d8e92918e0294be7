"""Programs that take a core away from an edge, and requests that it has to answer meanwhile; all ends by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from fedvit.incidents.drills.site import an_image
from fedvit.processes import end_child, end_with_parent

# Whatever becomes of us, they end.
_SPIN = "import time\nend = time.monotonic() + 600\nwhile time.monotonic() < end: pass"


@contextmanager
def pinned(pids: Collection[int], core: int) -> Iterator[None]:
    """Keep processes, with all their threads, on one core: the size of the device that they stand for."""
    before = os.sched_getaffinity(0)
    _pin(pids, {core})
    try:
        yield
    finally:
        _pin(pids, before)


def _pin(pids: Collection[int], cores: set[int]) -> None:
    for pid in pids:
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cores)


@dataclass
class Neighbours:
    """Busy processes on one core."""

    core: int
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._children)

    def add(self, count: int) -> None:
        """Let so many more run."""
        for _ in range(count):
            # A session each: the kernel shares a core out among sessions first.
            child = subprocess.Popen([sys.executable, "-c", _SPIN], start_new_session=True, preexec_fn=end_with_parent)
            os.sched_setaffinity(child.pid, {self.core})
            self._children.append(child)

    def end(self, count: int | None = None) -> None:
        """End so many of them, or all."""
        for _ in range(len(self._children) if count is None else min(count, len(self._children))):
            end_child(self._children.pop())


@contextmanager
def visitors(urls: Collection[str], threads: int) -> Iterator[None]:
    """Show an image to each of these, again and again, from so many threads each."""
    stop = threading.Event()
    image = an_image()

    def visit(url: str) -> None:
        with httpx.Client(timeout=60, trust_env=False) as http:
            while not stop.is_set():
                with suppress(httpx.HTTPError):
                    http.post(f"{url}/infer", content=image)

    pool = [threading.Thread(target=visit, args=(url,), daemon=True) for url in urls for _ in range(threads)]
    for thread in pool:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in pool:
            thread.join()
