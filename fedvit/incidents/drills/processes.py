"""The processes of one running system, found from its supervisor down; others may run on the same machine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

TITLES = {"control": "ray::ServeReplica:control", "aggregator": "ray::Aggregator"}


def supervisor(home: Path) -> int:
    """The process that ``fedvit up`` left running."""
    return int(json.loads((home / "run" / "system.json").read_text())["pid"])


def kill(home: Path, part: str) -> None:
    """``kill -9`` the process of one part of the system.

    Raises:
        LookupError: there is not exactly one.
    """
    found = below(supervisor(home), TITLES[part])
    if len(found) != 1:
        raise LookupError(f"{len(found)} processes are {TITLES[part]}")
    os.kill(found[0], signal.SIGKILL)


def below(ancestor: int, title: str) -> list[int]:
    """The descendants of a process whose title begins so."""
    return [pid for pid in _processes() if _title(pid).startswith(title) and ancestor in _above(pid)]


def named(ancestor: int, program: str) -> list[int]:
    """The descendants of a process that run the program of that file name."""
    return [pid for pid in _processes() if Path(_words(pid)[0]).name == program and ancestor in _above(pid)]


def with_words(ancestor: int, *words: str) -> list[int]:
    """The descendants of a process whose command line has these words one after another."""
    wanted = "\0".join(("", *words, ""))
    return [pid for pid in _processes() if wanted in f"\0{_title(pid)}" and ancestor in _above(pid)]


def memory_mb(pid: int) -> float:
    """What a process holds in memory now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _words(pid: int) -> list[str]:
    return _title(pid).split("\0")


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _above(pid: int) -> set[int]:
    """The ancestors of a process."""
    found: set[int] = set()
    while pid > 1:
        try:
            # The name in parentheses may hold anything; the parent is the second field behind it.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.add(pid)
    return found
