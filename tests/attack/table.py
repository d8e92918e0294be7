"""The table of attacks: what each one achieved and the bound that it must not exceed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedvit.atomic_write import write_atomically

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "security.json"
INTRODUCTION = """# Security: attacks and what they achieve

`make attack` plays these attacks against the system and writes this page; with `ARGS=tests/attack/test_vehicle.py` it
plays those of one file and replaces their rows. Each attack is also a test: it fails where an attack achieves more than
its bound. `make test` plays a shorter form. [The threat model](threat-model.md) says what is promised to whom.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One attack, the file that plays it, and the day (ISO 8601). ``achieved`` and ``bound`` are texts with units."""

    subject: str
    attack: str
    achieved: str
    bound: str
    file: str
    day: str


@dataclass(slots=True)
class AttackTable:
    """Collects the attacks of one test session.

    Args:
        day: of the session, ISO 8601.
    """

    day: str
    rows: list[Row] = field(default_factory=list)

    def add(self, subject: str, attack: str, *, achieved: str, bound: str) -> None:
        """Record an attack that stayed within its bound; call it after the assertion.

        Args:
            subject: the part that is attacked, for example "vehicle" or "control API"; one section of the page each.
        """
        file = os.environ["PYTEST_CURRENT_TEST"].split("::")[0]
        self.rows.append(Row(subject, attack, achieved, bound, file, self.day))

    def publish(self, files: Collection[str]) -> None:
        """Replace the rows of these test files in the stored results, and write the page."""
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        rows = [row for row in (Row(**row) for row in stored) if row.file not in files] + self.rows
        rows.sort(key=lambda row: (row.subject, row.file))
        write_atomically(RESULTS, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        write_atomically(DOCS / "security.md", page_of(rows))


def page_of(rows: Collection[Row]) -> str:
    """The page docs/security.md."""
    parts = [INTRODUCTION]
    for subject in sorted({row.subject for row in rows}):
        of_subject = [row for row in rows if row.subject == subject]
        days = " and ".join(sorted({row.day for row in of_subject}))
        parts.append(f"\n## {subject[0].upper()}{subject[1:]}\n\nPlayed in full on {days}.\n\n")
        parts.append("| attack | achieved | bound |\n|---|---|---|\n")
        parts += [f"| {row.attack} | {row.achieved} | {row.bound} |\n" for row in of_subject]
    return "".join(parts)
