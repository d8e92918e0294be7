"""What a scrape says of the parts behind the control API, also of one that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

from fedvit.errors import PlacementError
from fedvit.ports import AccountantPort, AggregatorPort, ProxyReport
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import load_settings
from fedvit.store.store import Store
from serve_apps.control.api import Services, create_api
from serve_apps.control.system.system import HealthMetrics

WAIT_S = 20.0


class Aggregator:
    """Answers once it is let; one of its proxies may be silent."""

    def __init__(self) -> None:
        self.let = threading.Event()
        self.let.set()
        self.silent = False
        self.asked = 0

    def progress(self) -> str:
        self.asked += 1
        assert self.let.wait(WAIT_S)
        return "resting"

    def proxies_alive(self) -> ProxyReport:
        return ProxyReport({"proxy-0": True, "proxy-1": not self.silent})


@pytest.fixture
def aggregator() -> Iterator[Aggregator]:
    result = Aggregator()
    yield result
    result.let.set()


@pytest.fixture
def services(tmp_path: Path, aggregator: Aggregator) -> Iterator[Services]:
    settings = load_settings(environ={}, overrides={"home": tmp_path})
    with Store.open(tmp_path) as store:
        accountant = PrivacyAccountant(store, settings)
        yield Services(settings, store, lambda: cast(AggregatorPort, aggregator), lambda: accountant)


def healthy() -> dict[str, float | None]:
    names = ("store", "registry", "accountant", "aggregator", "client_proxies")
    name = "fed_vit_autorl_component_healthy"
    return {part: REGISTRY.get_sample_value(name, {"component": part}) for part in names}


def test_all_parts_are_well(services: Services) -> None:
    HealthMetrics(services, ()).publish()
    assert set(healthy().values()) == {1.0}
    left = REGISTRY.get_sample_value("fed_vit_autorl_privacy_epsilon_remaining", {"privacy_unit": "record"})
    assert left == services.settings.privacy.target_epsilon
    size = REGISTRY.get_sample_value("fed_vit_autorl_store_bytes")
    assert size is not None
    assert size > 10_000


def test_a_silent_proxy_a_dead_accountant_and_a_lost_artifact_are_reported(
    services: Services, aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> AccountantPort:
        raise PlacementError("There is no accountant.")

    class Lost:
        artifacts = {"standard": "f" * 64}

    aggregator.silent = True
    monkeypatch.setattr(services.store.releases, "current", Lost)
    HealthMetrics(Services(services.settings, services.store, services.aggregator, nobody), ()).publish()
    assert healthy() == {"store": 1, "registry": 0, "accountant": 0, "aggregator": 1, "client_proxies": 0}


def test_a_part_that_hangs_holds_nothing_up_and_is_asked_once(services: Services, aggregator: Aggregator) -> None:
    health_metrics = HealthMetrics(services, (), answer_s=0.05)
    aggregator.let.clear()
    for _ in range(3):
        health_metrics.publish()
        assert healthy()["aggregator"] == 0
    assert aggregator.asked == 1
    aggregator.let.set()
    patient = HealthMetrics(services, (), answer_s=WAIT_S)
    patient.publish()
    assert set(healthy().values()) == {1.0}


def test_requests_are_timed_by_template_and_never_by_what_the_caller_wrote(services: Services) -> None:
    http = TestClient(create_api(services), raise_server_exceptions=False)

    def count(**labels: Any) -> float:
        return REGISTRY.get_sample_value("fed_vit_autorl_request_duration_seconds_count", labels) or 0.0

    template = {"method": "GET", "route": "/api/clients/{client_id}", "status": "4xx"}
    unknown, odd = {**template, "route": "other"}, {**template, "method": "other", "route": "other"}
    before = [count(**labels) for labels in (template, unknown, odd)]
    http.get("/api/clients/truck-7")
    http.get("/a/path/of/ones/own")
    http.request("BREW", "/a/path/of/ones/own")
    assert [count(**labels) for labels in (template, unknown, odd)] == [value + 1 for value in before]
    exported = http.get("/metrics").text
    assert "truck-7" not in exported
    assert "BREW" not in exported
