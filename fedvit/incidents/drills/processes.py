"""Processes of a drill: those of the system, found from its supervisor down, and load beside an edge."""

from __future__ import annotations

import json
import os
import signal
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
TITLES = {"control": "ray::ServeReplica:control", "aggregator": "ray::Aggregator"}


def supervisor(home: Path) -> int:
    """The process id of the supervisor that ``fedvit up`` started."""
    return int(json.loads((home / "run" / "system.json").read_text())["pid"])


def kill(home: Path, part: str) -> None:
    """``kill -9`` the process of one part of the system.

    Raises:
        LookupError: there is not exactly one.
    """
    pids = below(supervisor(home), TITLES[part])
    if len(pids) != 1:
        raise LookupError(f"{len(pids)} processes are {TITLES[part]}")
    os.kill(pids[0], signal.SIGKILL)


def below(ancestor: int, title: str) -> list[int]:
    """The descendants of a process whose title begins with ``title``."""
    return [pid for pid in _processes() if _title(pid).startswith(title) and ancestor in _above(pid)]


def named(ancestor: int, program: str) -> list[int]:
    """The descendants of a process that run the program of this file name."""
    return [pid for pid in _processes() if Path(_title(pid).split("\0")[0]).name == program and ancestor in _above(pid)]


def with_words(ancestor: int, *words: str) -> list[int]:
    """The descendants of a process whose command line contains these words in sequence."""
    wanted = "\0".join(("", *words, ""))
    return [pid for pid in _processes() if wanted in f"\0{_title(pid)}" and ancestor in _above(pid)]


def memory_mb(pid: int) -> float:
    """The resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _above(pid: int) -> set[int]:
    """The ancestors of a process."""
    ancestors: set[int] = set()
    while pid > 1:
        try:
            # The name in parentheses may hold anything; the parent is the second field behind it.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        ancestors.add(pid)
    return ancestors


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
