"""What Prometheus is to scrape, as files that it reads again whenever they change (``file_sd``).

The running system keeps them in its state folder, one a job. They outlive it where it did not end by itself: that its
targets are gone is what an alert is for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path("run") / "targets"
SERVER, EDGES, VEHICLES, RAY = "server", "edges", "vehicles", "ray"
GROUPS = (SERVER, EDGES, VEHICLES, RAY)
ADDRESS = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}):[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Target:
    """One address, host:port, with the labels that its series get."""

    address: str
    labels: dict[str, str] = field(default_factory=dict)


def targets_file(home: Path, group: str) -> Path:
    """Where the targets of a group are."""
    return home / FOLDER / f"{group}.json"


def write_targets(home: Path, group: str, targets: Iterable[Target]) -> None:
    """Replace a group, at once; nothing is written where nothing changed."""
    path = targets_file(home, group)
    text = json.dumps([{"targets": [target.address], "labels": target.labels} for target in targets], indent=1)
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    draft.replace(path)


def link_targets(home: Path, group: str, kept_elsewhere: Path) -> None:
    """Let a group be what somebody else keeps in a file of the same form."""
    path = targets_file(home, group)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    os.symlink(kept_elsewhere, draft)
    draft.replace(path)
