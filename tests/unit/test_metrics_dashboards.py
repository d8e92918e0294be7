"""Asked of a real Prometheus: every panel of the dashboards, and the runbook's two queries as they are printed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from metric_labels import sample_labels
from prometheus_client import CollectorRegistry
from prometheus_server import PrometheusServer, exporter, prometheus

from edge_runtime.stats import RequestStats
from fedvit.metrics import exposition
from fedvit.metrics.catalogue import CATALOGUE
from fedvit.metrics.dashboards import DASHBOARDS, Panel, as_json
from fedvit.wire.manifest import ReleaseManifest

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "cluster_configs" / "monitoring" / "grafana"
PANELS = [(dashboard, panel) for dashboard, panels in DASHBOARDS.items() for panel in panels]
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is missing: install it")


class Everything:
    """Exports every metric of the catalogue with every label that is known; each rendering counts on."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

    def __call__(self) -> bytes:
        for metric in CATALOGUE:
            instrument = getattr(exposition, metric.kind)(metric.name, self._registry)
            count = {"counter": "inc", "gauge": "set", "histogram": "observe"}[metric.kind]
            for labels in sample_labels(metric):
                getattr(instrument.labels(**labels) if labels else instrument, count)(0.5)
        return exposition.render(None, self._registry)[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    folder = tmp_path_factory.mktemp("prometheus")
    watchdog = ROOT / "cluster_configs" / "monitoring" / "rules" / "watchdog.yml"
    with exporter(Everything()) as address:
        jobs = {"fed-server": address, "fed-edge": address}
        with prometheus(folder, jobs, watchdog) as running:
            # So many scrapes, and rates can be told.
            running.await_that('count_over_time(up{job="fed-edge"}[1m]) >= 4')
            yield running


@needs_prometheus
@pytest.mark.parametrize(("dashboard", "panel"), PANELS, ids=[f"{name}: {panel.title}" for name, panel in PANELS])
def test_every_panel_shows_something(server: PrometheusServer, dashboard: str, panel: Panel) -> None:
    for expression in panel.expressions():
        series = server.await_that(expression.replace("$__rate_interval", "10s"))
        assert all(sample["value"][1] != "NaN" for sample in series), (dashboard, series)


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_what_grafana_reads_is_current(dashboard: str) -> None:
    text = (GRAFANA / "dashboards" / f"{dashboard}.json").read_text()
    assert text == as_json(dashboard), "run: fedvit monitoring dashboards cluster_configs/monitoring/grafana/dashboards"
    page = json.loads(text)
    assert len({panel["id"] for panel in page["panels"]}) == len(DASHBOARDS[dashboard])
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in page["panels"]}
    assert len(places) == len(DASHBOARDS[dashboard])
    uid = re.search(r"uid: (\S+)", (GRAFANA / "provisioning" / "datasources" / "fedvit.yml").read_text())
    assert uid is not None
    assert {panel["datasource"]["uid"] for panel in page["panels"]} == {uid[1]}


def test_every_metric_is_on_a_dashboard() -> None:
    shown = " ".join(expression for _, panel in PANELS for expression in panel.expressions())
    assert [metric.name for metric in CATALOGUE if metric.full_name not in shown] == []


# --- the runbook's own queries ---------------------------------------------------------------------------------------


def printed_queries() -> list[str]:
    """What the runbook's curl commands ask Prometheus, as printed."""
    text = (ROOT / "docs" / "runbook.md").read_text()
    urls = re.findall(r'"(http://localhost:9090/api/v1/query\?[^"]+)"', text)
    return [parse_qs(urlsplit(url).query)["query"][0] for url in urls]


def manifest(version: str, variant: str, sequence: int) -> ReleaseManifest:
    return ReleaseManifest(
        sequence=sequence,
        version=version,
        variant=variant,
        artifact_digest="a" * 64,
        artifact_bytes=1,
        classes=("red", "green"),
        image_size=8,
        run_id="run-0001",
        round_index=1,
        data_digest="d" * 64,
        epsilon=1.0,
        delta=1e-5,
        privacy_unit="record",
        created_at="2026-01-01T00:00:00+00:00",
        metrics={},
    )


@needs_prometheus
def test_the_runbooks_queries_tell_the_truth_after_a_switch_of_variant(tmp_path: Path) -> None:
    loss_query, latency_query = printed_queries()
    registry = CollectorRegistry()
    stats = RequestStats(registry)
    exposition.gauge("training_loss", registry).set(0.25)

    def p95_is(low_s: float, high_s: float) -> Any:
        return lambda series: len(series) == 1 and low_s < float(series[0]["value"][1]) <= high_s

    def serve(sequence: int, variant: str, seconds: float, images: int) -> None:
        stats.serves(manifest("v1.1.10", variant, sequence))
        for _ in range(images):
            stats.succeeded(sequence, seconds, 0)

    with (
        exporter(lambda: exposition.render(None, registry)[0]) as address,
        prometheus(tmp_path, {"edge": address}) as asked,
    ):
        serve(1, "standard", 0.4, 1000)
        asked.await_that(latency_query, p95_is(0.25, 0.5))
        (loss,) = asked.query(loss_query)
        assert float(loss["value"][1]) == 0.25
        # Ten fast images against a thousand slow ones of the same version: no trace of these is left.
        serve(2, "edge_optimized", 0.004, 10)
        (series,) = asked.await_that(latency_query, p95_is(0.002, 0.005))
        assert series["metric"]["model_version"] == "v1.1.10"
        # And back: what it took before the switch is not remembered either.
        serve(3, "standard", 0.04, 1)
        asked.await_that(latency_query, p95_is(0.035, 0.05))
