"""Incident report: the runbook's template, filled from the store; fields that only people know stay blank.

A test compares the template with the one in docs/runbook.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

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
    """The contents of a report. ``epsilons`` are the spend at the incident's beginning and end; None if unknown."""

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
    """The facts about an incident in the store.

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
    """The filled template as Markdown, with the template's headings in their order."""
    lines = (text for line in TEMPLATE.splitlines() for text in _filled(line, facts))
    return "\n".join(lines) + "\n"


def _filled(line: str, facts: Facts) -> list[str]:
    """The lines of the report for a line of the template; the line itself if there is nothing to fill in."""
    if line.startswith("# "):
        return [f"# Incident Report: {facts.incident.incident_id}"]
    if line.startswith("- **"):
        name = line.removeprefix("- **").partition("**")[0]
        return [f"- **{name}**: {_FIELDS[name](facts)}".rstrip()]
    if line.startswith("- HH:MM"):
        # The timeline replaces the first of the template's lines.
        return _timeline_lines(facts.timeline) if line.endswith("Issue detected") else []
    if line == "- [ ] Add automated recovery":
        return [line, *(f"- [ ] {text}" for text in facts.notes[Section.ACTION_ITEM])]
    return {
        "[Detailed analysis]": list(facts.notes[Section.ROOT_CAUSE]),
        "[Steps taken to resolve]": _steps(facts),
        "[Measures to prevent recurrence]": list(facts.notes[Section.PREVENTION]),
    }.get(line) or [line]


# --- fields ----------------------------------------------------------------------------------------------------------


def _duration(facts: Facts) -> str:
    resolved_at = facts.incident.resolved_at
    minutes, seconds = divmod(int(((resolved_at or facts.now) - facts.incident.opened_at).total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    duration = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
    return duration if resolved_at else f"{duration}, and not over"


def _clients_affected(facts: Facts) -> str:
    """The clients that alerts name or that were quarantined; the log knows no others."""
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


def _note(section: Section) -> Callable[[Facts], str]:
    """The first note of a section, in one line."""
    return lambda facts: _one_line(next(iter(facts.notes[section]), ""))


_FIELDS: Mapping[str, Callable[[Facts], str]] = {
    "Date": lambda facts: f"{facts.incident.opened_at:%Y-%m-%d} (times are UTC)",
    "Duration": _duration,
    "Severity": lambda facts: f"{facts.incident.severity} ({facts.incident.alertname})",
    "Root Cause": _note(Section.ROOT_CAUSE),
    "Clients Affected": _clients_affected,
    "Data Loss": _data_loss,
    "Privacy Impact": _privacy_impact,
    "Business Impact": _note(Section.BUSINESS_IMPACT),
}


def _steps(facts: Facts) -> list[str]:
    """The notes, then the successful calls."""
    calls = [entry for entry in facts.timeline if entry.kind in ("command", "remediation") and "→ 2" in entry.text]
    return [*facts.notes[Section.RESOLUTION], *(f"- {entry.text}, by {entry.actor}" for entry in calls)]


# --- text ------------------------------------------------------------------------------------------------------------


def _timeline_lines(entries: Sequence[Entry]) -> list[str]:
    """Time and text of each entry; with the date if it is not the first entry's."""
    lines = []
    for entry in entries:
        time = f"{entry.at:%H:%M}" if entry.at.date() == entries[0].at.date() else f"{entry.at:%Y-%m-%d %H:%M}"
        lines.append(f"- {time} - {_one_line(entry.text + (f', by {entry.actor}' if entry.actor is not None else ''))}")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _epsilons(store: Store, settings: Settings, since: datetime, until: datetime) -> tuple[float, float] | None:
    try:
        return epsilon_spent_at(store, settings, since), epsilon_spent_at(store, settings, until)
    except FedvitError:
        # The report does not need an intact ledger.
        return None
