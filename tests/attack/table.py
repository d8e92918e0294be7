"""The table of attacks: what each one achieved and the bound that it must not exceed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

INTRODUCTION = """# Security: attacks and what they achieve

`make attack` plays these attacks against the system and writes this page. Each of them is also a test: it fails where
an attack achieves more than its bound. [The threat model](threat-model.md) says what is promised to whom.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One attack. ``achieved`` and ``bound`` are texts with their units."""

    subject: str
    attack: str
    achieved: str
    bound: str


@dataclass(slots=True)
class AttackTable:
    """Collects the attacks of one test session."""

    rows: list[Row] = field(default_factory=list)

    def add(self, subject: str, attack: str, *, achieved: str, bound: str) -> None:
        """Record an attack that stayed within its bound; call it after the assertion.

        Args:
            subject: the part that is attacked, for example "vehicle" or "control API"; one section of the page each.
        """
        self.rows.append(Row(subject, attack, achieved, bound))

    def to_json(self) -> list[dict[str, Any]]:
        """JSON types only."""
        return [asdict(row) for row in self.rows]

    def page(self) -> str:
        """The page docs/security.md."""
        parts = [INTRODUCTION]
        for subject in sorted({row.subject for row in self.rows}):
            parts.append(f"\n## {subject[0].upper()}{subject[1:]}\n\n| attack | achieved | bound |\n|---|---|---|\n")
            of_subject = [row for row in self.rows if row.subject == subject]
            parts += [f"| {row.attack} | {row.achieved} | {row.bound} |\n" for row in of_subject]
        return "".join(parts)
