"""A real Alertmanager and the control API: what it posts is understood, and what it posts late is not lost."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from incident_site import Site

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.types import utc_now

PROGRAM = shutil.which("alertmanager") or shutil.which("prometheus-alertmanager")
WAIT_S = 60.0
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="alertmanager is not installed")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def awaited(what: str, ask: Callable[[], Any]) -> Any:
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        result = ask()
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {WAIT_S:g} s")


class Stand:
    """Alertmanager beside a control API that may not be there yet."""

    def __init__(self, folder: Path, **remediation: Any) -> None:
        self.site = Site(folder / "home", more={"remediation": remediation}, mode="tokens")
        self.control, self.port = free_port(), free_port()
        token = create_token(self.site.store, "alertmanager", [Scope.ALERTS], now=utc_now()).text
        (folder / "token").write_text(token)
        (folder / "alertmanager.yml").write_text(
            f"""\
route: {{receiver: fedvit, group_by: [alertname], group_wait: 0s, group_interval: 1s, repeat_interval: 1s}}
receivers:
  - name: fedvit
    webhook_configs:
      - url: http://127.0.0.1:{self.control}/api/incidents/alerts
        send_resolved: true
        max_alerts: 500
        http_config: {{authorization: {{credentials_file: {folder / "token"}}}}}
"""
        )
        self._log = (folder / "alertmanager.log").open("wb")
        self._manager = subprocess.Popen(
            [
                str(PROGRAM),
                f"--config.file={folder / 'alertmanager.yml'}",
                f"--storage.path={folder / 'storage'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--cluster.listen-address=",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        awaited("Alertmanager answers", self._is_ready)

    def serve(self) -> None:
        """Start the control API on its port."""
        config = uvicorn.Config(self.site.http.app, port=self.control, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()

    def tell(self, name: str, *, began_s: float, ended_s: float | None = None, **labels: str) -> None:
        """What Prometheus tells Alertmanager: an alert that began, and may have ended, so many seconds ago."""
        now = utc_now()
        alert = {
            "labels": {"alertname": name, "severity": "P0", **labels},
            "annotations": {"summary": f"{name}, in words.", "runbook_url": "docs/runbook.md"},
            "startsAt": (now - timedelta(seconds=began_s)).isoformat(),
            "generatorURL": "http://127.0.0.1:9090/graph",
        }
        if ended_s is not None:
            alert["endsAt"] = (now - timedelta(seconds=ended_s)).isoformat()
        answer = httpx.post(f"http://127.0.0.1:{self.port}/api/v2/alerts", json=[alert])
        assert answer.status_code == 200, answer.text

    def count(self, metric: str) -> float:
        """What Alertmanager counts of its webhook."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        result = re.search(rf'^alertmanager_{metric}{{integration="webhook"}} (\S+)$', text, re.MULTILINE)
        return float(result[1]) if result else 0.0

    def close(self) -> None:
        self._manager.terminate()
        self._manager.wait(WAIT_S)
        self._log.close()
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(WAIT_S)
        self.site.close()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/-/ready").is_success
        except httpx.TransportError:
            return False


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Stand]]:
    stands = []

    def build(**remediation: Any) -> Stand:
        stands.append(Stand(tmp_path, **remediation))
        return stands[-1]

    yield build
    for stand in stands:
        stand.close()


def test_alertmanager_opens_repeats_and_resolves_and_remediation_acts_once(make: Callable[..., Stand]) -> None:
    stand = make(allow=["stop_training"])
    store = stand.site.store
    stand.serve()
    stand.tell("PrivacyBudgetExhausted", began_s=90)
    (incident,) = awaited("an incident", lambda: store.incidents.all(is_open=True))
    assert (incident.alertname, incident.severity) == ("PrivacyBudgetExhausted", "P0")
    lines = awaited("an action", store.audit.entries)
    awaited("repetitions", lambda: stand.count("notifications_total") >= 3)
    stand.tell("PrivacyBudgetExhausted", began_s=90, ended_s=1)
    awaited("its end", lambda: store.incidents.get(incident.incident_id).resolved_at)
    assert (
        [line.facts.actor for line in store.audit.entries()] == ["remediation"] == [line.facts.actor for line in lines]
    )


def test_what_fired_while_the_control_api_was_down_is_logged_when_it_is_back(make: Callable[..., Stand]) -> None:
    stand = make()
    stand.tell("ServiceDown", began_s=300, instance="127.0.0.1:8000")
    # It has been tried, and refused, before there is anybody to take it.
    awaited("a try", lambda: stand.count("notification_requests_failed_total") >= 1)
    stand.serve()
    (incident,) = awaited("an incident", stand.site.store.incidents.all)
    assert utc_now() - incident.opened_at > timedelta(seconds=299)
    (logged,) = stand.site.store.incidents.alerts(incident.incident_id)
    assert logged.received_at - logged.alert.starts_at > timedelta(seconds=299)
