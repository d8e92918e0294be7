"""The report on an incident: the runbook's template, filled with what is known and blank where only people know.

The template stands here once; docs/runbook.md prints it, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from fedvit.api.choices import Section
from fedvit.config import Settings
from fedvit.errors import FedvitError
from fedvit.incidents.log import Entry, span, timeline
from fedvit.incidents.playbook import client_of
from fedvit.privacy.accountant import epsilon_spent_at
from fedvit.store.records import Incident, LoggedAlert, RoundTally
from fedvit.store.store import Store

TEMPLATE = """\
# Incident Report: [INC-YYYY-MMDD-XXX]

## Summary
- **Date**:
- **Duration**:
- **Severity**:
- **Root Cause**:

## Timeline
- HH:MM - Issue detected
- HH:MM - Investigation started
- HH:MM - Root cause identified
- HH:MM - Resolution implemented
- HH:MM - Service restored

## Impact
- **Clients Affected**:
- **Data Loss**:
- **Privacy Impact**:
- **Business Impact**:

## Root Cause Analysis
[Detailed analysis]

## Resolution
[Steps taken to resolve]

## Prevention
[Measures to prevent recurrence]

## Action Items
- [ ] Update monitoring alerts
- [ ] Improve documentation
- [ ] Add automated recovery
"""
_NAMED = 20


@dataclass(frozen=True, slots=True)
class Facts:
    """What a report is made of. ``epsilons`` are what was spent at the incident's beginning and end; None: unknown."""

    incident: Incident
    alerts: Sequence[LoggedAlert]
    timeline: Sequence[Entry]
    quarantined: Sequence[str]
    rounds: RoundTally
    epsilons: tuple[float, float] | None
    target_delta: float
    now: datetime
    notes: Mapping[Section, Sequence[str]] = field(default_factory=dict)


def collect(store: Store, settings: Settings, incident_id: str, now: datetime) -> Facts:
    """Everything that the state knows of an incident.

    Raises:
        NotFoundError: no such incident.
    """
    incident = store.incidents.get(incident_id)
    since, until = span(incident, now)
    events = store.incidents.events(incident_id)
    return Facts(
        incident=incident,
        alerts=store.incidents.alerts(incident_id),
        timeline=timeline(store, incident, now),
        quarantined=store.clients.quarantined_between(since, until),
        rounds=store.rounds.tally(since, until),
        epsilons=_epsilons(store, settings, since, until),
        target_delta=settings.privacy.target_delta,
        now=now,
        notes={section: [event.text for event in events if event.kind == section] for section in Section},
    )


def report(facts: Facts) -> str:
    """The template, filled; Markdown. Its headings and their order are the template's."""
    fill = _Fill(facts)
    lines: list[str] = []
    for line in TEMPLATE.splitlines():
        lines += fill.line(line)
    return "\n".join(lines) + "\n"


class _Fill:
    """Goes through the template line by line; what it has no better word for stays as it is."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._told_timeline = False
        self._fields: dict[str, Callable[[Facts], str]] = {
            "Date": _date,
            "Duration": _duration,
            "Severity": _severity,
            "Root Cause": lambda facts: _first_line(_noted(facts, Section.ROOT_CAUSE)),
            "Clients Affected": _clients_affected,
            "Data Loss": _data_loss,
            "Privacy Impact": _privacy_impact,
            "Business Impact": lambda facts: _first_line(_noted(facts, Section.BUSINESS_IMPACT)),
        }

    def line(self, line: str) -> list[str]:
        """What stands in the report for a line of the template."""
        facts = self._facts
        if line.startswith("# "):
            return [f"# Incident Report: {facts.incident.incident_id}"]
        if line.startswith("- **"):
            name = line.removeprefix("- **").partition("**")[0]
            return [f"- **{name}**: {self._fields[name](facts)}".rstrip()]
        if line.startswith("- HH:MM"):
            told, self._told_timeline = self._told_timeline, True
            return [] if told else _timeline_lines(facts.timeline)
        if line == "- [ ] Add automated recovery":
            return [line, *(f"- [ ] {text}" for text in facts.notes[Section.ACTION_ITEM])]
        return {
            "[Detailed analysis]": list(facts.notes[Section.ROOT_CAUSE]),
            "[Steps taken to resolve]": _steps(facts),
            "[Measures to prevent recurrence]": list(facts.notes[Section.PREVENTION]),
        }.get(line) or [line]


# --- the fields ------------------------------------------------------------------------------------------------------


def _date(facts: Facts) -> str:
    return f"{facts.incident.opened_at:%Y-%m-%d} (times are UTC)"


def _duration(facts: Facts) -> str:
    resolved_at = facts.incident.resolved_at
    took = _words((resolved_at or facts.now) - facts.incident.opened_at)
    return took if resolved_at else f"{took}, and not over"


def _severity(facts: Facts) -> str:
    return f"{facts.incident.severity} ({facts.incident.alertname})"


def _clients_affected(facts: Facts) -> str:
    """Those that alerts name, or that came into quarantine: whoever else was affected, nobody told the log."""
    named = {client_of(one.alert.labels) or one.alert.labels.get("instance") for one in facts.alerts} - {None}
    parts = [f"{_list(sorted(map(str, named)))} (named by alerts)"] if named else []
    if facts.quarantined:
        parts.append(f"{_list(facts.quarantined)} (quarantined)")
    return "; ".join(parts) or "no alert names one, and none came into quarantine"


def _data_loss(facts: Facts) -> str:
    rounds = facts.rounds
    return (
        f"rounds: {rounds.lost} lost, {rounds.committed} committed, {rounds.under_way} under way; updates: "
        f"{rounds.refused} of {rounds.answers} refused or lost, 0 doubled (a client counts once a round)"
    )


def _privacy_impact(facts: Facts) -> str:
    if facts.epsilons is None:
        return ""
    before, after = facts.epsilons
    return f"epsilon spent: {before:.4f} before, {after:.4f} after, at delta {facts.target_delta:g} (from the ledger)"


def _noted(facts: Facts, section: Section) -> str:
    return next(iter(facts.notes[section]), "")


def _steps(facts: Facts) -> list[str]:
    """What people wrote, then the calls that were made and answered well."""
    found = (entry for entry in facts.timeline if entry.kind in ("command", "remediation"))
    calls = [entry for entry in found if "→ 2" in entry.text]
    return [
        *facts.notes[Section.RESOLUTION],
        *(f"- {entry.text}, by {entry.actor}" for entry in calls),
    ]


# --- words -----------------------------------------------------------------------------------------------------------


def _timeline_lines(entries: Sequence[Entry]) -> list[str]:
    """HH:MM and what happened; with the day where that is another than the first."""
    return [
        f"- {moment} - {_first_line(_told(entry))}" for moment, entry in zip(_moments(entries), entries, strict=True)
    ]


def _moments(entries: Sequence[Entry]) -> Iterator[str]:
    first = entries[0].at.date() if entries else None
    for entry in entries:
        yield f"{entry.at:%H:%M}" if entry.at.date() == first else f"{entry.at:%Y-%m-%d %H:%M}"


def _told(entry: Entry) -> str:
    return entry.text if entry.actor is None else f"{entry.text}, by {entry.actor}"


def _first_line(text: str) -> str:
    return " ".join(text.split())


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _words(duration: timedelta) -> str:
    minutes, seconds = divmod(int(duration.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _epsilons(store: Store, settings: Settings, since: datetime, until: datetime) -> tuple[float, float] | None:
    try:
        return epsilon_spent_at(store, settings, since), epsilon_spent_at(store, settings, until)
    except FedvitError:
        # A ledger that cannot be interpreted is no reason to have no report.
        return None
