"""The processes of one running system: descendants of its supervisor, selected by title, program or arguments."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

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
