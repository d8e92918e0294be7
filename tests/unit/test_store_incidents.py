"""The incident log: opened, joined, resolved, reopened, and reported twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedvit.errors import NotFoundError
from fedvit.store.records import FiredAlert, IncidentEvent
from fedvit.store.store import Store
from fedvit.types import Severity

NOON = datetime(2026, 11, 24, 12, 0, 0, 123456, tzinfo=UTC)
OFFLINE = FiredAlert("EdgeDeviceOffline", Severity.P2, "a" * 16, NOON, annotations={"summary": "Edge 1 is gone."})
OTHER = replace(OFFLINE, fingerprint="b" * 16, starts_at=NOON + timedelta(minutes=5), severity=Severity.P1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as store:
        yield store


def minutes(count: float) -> datetime:
    return NOON + timedelta(minutes=count)


def report(store: Store, *alerts: FiredAlert, at: datetime = NOON + timedelta(hours=3)) -> list[str]:
    return store.incidents.record_alerts(alerts, reopen_within=timedelta(hours=1), at=at)


def ended(alert: FiredAlert, after_min: float) -> FiredAlert:
    return replace(alert, ends_at=minutes(after_min))


def kinds(store: Store, incident_id: str) -> list[str]:
    return [event.kind for event in store.incidents.events(incident_id)]


def test_a_firing_opens_one_incident_however_often_it_is_reported(store: Store) -> None:
    assert [report(store, OFFLINE, OFFLINE), report(store, OFFLINE)] == [["INC-2026-1124-001"]] * 2
    incident = store.incidents.get("INC-2026-1124-001")
    assert (incident.opened_at, incident.resolved_at, incident.summary) == (NOON, None, "Edge 1 is gone.")
    assert (incident.alerts, incident.firing, incident.severity) == (1, 1, Severity.P2)
    assert kinds(store, incident.incident_id) == ["opened"]


def test_an_incident_ends_with_its_last_alert_and_has_the_worst_severity(store: Store) -> None:
    report(store, OFFLINE)
    assert report(store, OTHER) == ["INC-2026-1124-001"]
    report(store, ended(OFFLINE, 7))
    half = store.incidents.get("INC-2026-1124-001")
    assert (half.resolved_at, half.alerts, half.firing, half.severity) == (None, 2, 1, Severity.P1)
    for _ in range(2):
        report(store, ended(OTHER, 9), ended(OFFLINE, 7))
    assert store.incidents.get("INC-2026-1124-001").resolved_at == minutes(9)
    assert kinds(store, "INC-2026-1124-001") == ["opened", "resolved"]
    assert [logged.alert.ends_at for logged in store.incidents.alerts("INC-2026-1124-001")] == [minutes(7), minutes(9)]


def test_a_firing_told_again_after_its_end_changes_nothing(store: Store) -> None:
    report(store, ended(OFFLINE, 7))
    report(store, OFFLINE)
    assert store.incidents.get("INC-2026-1124-001").resolved_at == minutes(7)


def test_one_that_ends_while_another_begins_never_ended_the_incident(store: Store) -> None:
    report(store, OFFLINE)
    report(store, ended(OFFLINE, 7), OTHER)
    assert kinds(store, "INC-2026-1124-001") == ["opened"]


def test_firing_again_within_the_window_reopens_and_later_opens_another(store: Store) -> None:
    report(store, ended(OFFLINE, 7))
    again = replace(OFFLINE, starts_at=minutes(60))
    assert report(store, again) == ["INC-2026-1124-001"]
    assert store.incidents.get("INC-2026-1124-001").resolved_at is None
    report(store, ended(again, 65))
    assert kinds(store, "INC-2026-1124-001") == ["opened", "resolved", "reopened", "resolved"]
    assert report(store, replace(OFFLINE, starts_at=minutes(126))) == ["INC-2026-1124-002"]


def test_incidents_of_other_alerts_stand_alone_and_are_counted_by_the_day_they_began(store: Store) -> None:
    report(store, OFFLINE)
    assert report(store, replace(OFFLINE, alertname="DataDrift", fingerprint="c")) == ["INC-2026-1124-002"]
    yesterday = replace(OFFLINE, alertname="ServiceDown", fingerprint="d", starts_at=NOON - timedelta(days=1))
    assert report(store, yesterday) == ["INC-2026-1123-001"]
    assert [item.alertname for item in store.incidents.all()] == ["ServiceDown", "DataDrift", "EdgeDeviceOffline"]
    assert [item.alertname for item in store.incidents.all(offset=1, limit=1)] == ["DataDrift"]
    report(store, ended(OFFLINE, 7))
    assert [item.alertname for item in store.incidents.all(is_open=False)] == ["EdgeDeviceOffline"]
    assert store.incidents.count_open() == {Severity.P0: 0, Severity.P1: 0, Severity.P2: 2, Severity.P3: 0}


def test_what_is_heard_late_began_when_it_began(store: Store) -> None:
    """ServiceDown is heard when the control API is back."""
    report(store, ended(replace(OFFLINE, alertname="ServiceDown"), 7), at=minutes(9))
    incident = store.incidents.get("INC-2026-1124-001")
    assert (incident.opened_at, incident.resolved_at) == (NOON, minutes(7))
    (logged,) = store.incidents.alerts("INC-2026-1124-001")
    assert logged.received_at == minutes(9)


def test_a_clock_that_runs_ahead_opens_nothing_in_the_future(store: Store) -> None:
    report(store, replace(OFFLINE, starts_at=NOON + timedelta(days=9)), at=NOON)
    assert store.incidents.get("INC-2026-1124-001").opened_at == NOON


def test_notes_stand_in_the_history_of_an_incident_that_is_there(store: Store) -> None:
    report(store, OFFLINE)
    event = IncidentEvent(minutes(3), "root_cause", "token:1:Ana", "A cable.")
    store.incidents.add_event("INC-2026-1124-001", event)
    assert store.incidents.events("INC-2026-1124-001")[-1] == event
    with pytest.raises(NotFoundError):
        store.incidents.add_event("INC-0", event)
