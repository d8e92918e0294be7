"""The memory of a process and all that descend from it: proportional set sizes (PSS), added up.

PSS counts a page that n processes share as 1/n for each, so shared memory is counted once.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

EVERY_S = 2.0


def descendants(root: int) -> set[int]:
    """The process and its children's children."""
    parents = dict[int, int]()
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(path.name)] = int(fields[1])
    result, grew = {root}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in result} - result
        result |= more
        grew = bool(more)
    return result


def pss_mb(pids: set[int]) -> float:
    """The proportional set sizes of these processes together, in MB (10^6 bytes)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e6


class TreeWatch:
    """Looks every two seconds, in a thread of its own, for as long as the block lasts.

    No oftener: what it reads costs the machine some milliseconds a process.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.samples: list[tuple[float, float]] = []
        """Moments (time.monotonic) and MB."""

    def peak_mb(self) -> float:
        """The most that was seen."""
        return round(max((mb for _, mb in self.samples), default=0.0), 1)

    def now_mb(self) -> float:
        """What is there at this moment."""
        return pss_mb(descendants(self._root))

    def __enter__(self) -> TreeWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        # What is quicker than a look is seen as well.
        self.samples.append((time.monotonic(), self.now_mb()))

    def _look(self) -> None:
        while not self._ended.wait(EVERY_S):
            self.samples.append((time.monotonic(), self.now_mb()))
