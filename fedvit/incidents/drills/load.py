"""CPU load beside an edge, and inference requests that it has to answer meanwhile; both end by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from fedvit.incidents.drills.system import sample_image
from fedvit.processes import end_child, end_with_parent

# The processes end after ten minutes even if this one is killed.
_SPIN = "import time\nend = time.monotonic() + 600\nwhile time.monotonic() < end: pass"


@contextmanager
def pinned(pids: Collection[int], core: int) -> Iterator[None]:
    """Keep processes, with all their threads, on one core: the size of the device that they stand for."""
    cores_before = os.sched_getaffinity(0)
    _pin(pids, {core})
    try:
        yield
    finally:
        _pin(pids, cores_before)


def _pin(pids: Collection[int], cores: set[int]) -> None:
    for pid in pids:
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cores)


class BusyProcesses:
    """Busy processes on one core."""

    def __init__(self, core: int) -> None:
        self._core, self._children = core, list[subprocess.Popen[bytes]]()

    def __len__(self) -> int:
        return len(self._children)

    def start(self, count: int) -> None:
        """Start ``count`` more processes."""
        for _ in range(count):
            # A session each: the kernel shares a core out among sessions first.
            child = subprocess.Popen([sys.executable, "-c", _SPIN], start_new_session=True, preexec_fn=end_with_parent)
            os.sched_setaffinity(child.pid, {self._core})
            self._children.append(child)

    def end(self, count: int | None = None) -> None:
        """End ``count`` processes, or all."""
        for _ in range(len(self._children) if count is None else min(count, len(self._children))):
            end_child(self._children.pop())


@contextmanager
def inference_requests(urls: Collection[str], threads: int) -> Iterator[None]:
    """Send an image to each URL repeatedly, from ``threads`` threads each."""
    stop = threading.Event()
    image = sample_image()

    def send(url: str) -> None:
        with httpx.Client(timeout=60, trust_env=False) as http:
            while not stop.is_set():
                with suppress(httpx.HTTPError):
                    http.post(f"{url}/infer", content=image)

    pool = [threading.Thread(target=send, args=(url,), daemon=True) for url in urls for _ in range(threads)]
    for thread in pool:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in pool:
            thread.join()
