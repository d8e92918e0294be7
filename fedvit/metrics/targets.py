"""Scrape targets for Prometheus, as ``file_sd`` files that it reads again when they change.

The running system keeps one file for each job in its state folder. The files remain after a crash, so that an alert
shows the missing targets.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fedvit.atomic_write import write_atomically

FOLDER = Path("run") / "targets"
SERVER, EDGES, VEHICLES, RAY = "server", "edges", "vehicles", "ray"
GROUPS = (SERVER, EDGES, VEHICLES, RAY)
ADDRESS = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}):[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Target:
    """One address, host:port, and the labels of its series."""

    address: str
    labels: dict[str, str] = field(default_factory=dict)


def targets_file(home: Path, group: str) -> Path:
    """File with the targets of a group."""
    return home / FOLDER / f"{group}.json"


def write_targets(home: Path, group: str, targets: Iterable[Target]) -> None:
    """Replace the targets of a group atomically, if they changed."""
    path = targets_file(home, group)
    text = json.dumps([{"targets": [target.address], "labels": target.labels} for target in targets], indent=1)
    if not (path.is_file() and path.read_text() == text):
        write_atomically(path, text)


def link_targets(home: Path, group: str, source: Path) -> None:
    """Let the file of a group be a link to another ``file_sd`` file."""
    path = targets_file(home, group)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    os.symlink(source, draft)
    draft.replace(path)
