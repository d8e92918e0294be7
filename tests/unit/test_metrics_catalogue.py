"""The table of metrics: every one can be made, is documented, and has labels that nobody outside can choose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from metric_labels import sample_labels
from prometheus_client import CollectorRegistry

from fedvit.api.clients import SecurePhase
from fedvit.metrics import catalogue, exposition
from fedvit.metrics.catalogue import CATALOGUE, OTHER, Label
from fedvit.rounds.machine import Phase
from fedvit.secure_session import PHASES

ROOT = Path(__file__).parents[2]
# Phases in which no work is done.
QUIET = {Phase.IDLE, Phase.RESTING}


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_every_metric_is_made_and_rendered_under_its_name(metric: catalogue.Metric) -> None:
    registry = CollectorRegistry()
    instrument = getattr(exposition, metric.kind)(metric.name, registry)
    labels = next(sample_labels(metric))
    series = instrument.labels(**labels) if labels else instrument
    getattr(series, {"counter": "inc", "gauge": "set", "histogram": "observe"}[metric.kind])(1.0)
    suffix = "_count" if metric.kind == "histogram" else ""
    assert registry.get_sample_value(metric.full_name + suffix, labels) == 1.0


def test_the_document_is_current() -> None:
    assert (ROOT / "docs/reference/metrics.md").read_text() == catalogue.markdown(), "run: fedvit monitoring catalogue"


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.full_name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    for metric in CATALOGUE:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert ("seconds" in metric.name) == (metric.unit == "seconds")
        assert all(bool(label.values) != bool(label.origin) for label in metric.labels)


def test_phases_are_those_of_the_loop() -> None:
    assert set(catalogue.PHASES) == {phase.value for phase in Phase} - {phase.value for phase in QUIET}


def test_phases_of_secure_aggregation_are_those_of_a_session() -> None:
    assert catalogue.SECURE_PHASES == PHASES == get_args(SecurePhase)


def test_text_from_outside_becomes_no_label() -> None:
    method = Label("method", catalogue.METHODS)
    assert method.of("GET") == "GET"
    assert method.of("GET\nfed_vit_autorl_x 1") == OTHER


def test_counters_begin_at_zero_for_every_label_that_is_known() -> None:
    registry = CollectorRegistry()
    exposition.counter("client_updates_total", registry)
    values = {
        outcome: registry.get_sample_value("fed_vit_autorl_client_updates_total", {"outcome": outcome})
        for outcome in catalogue.UPDATE_OUTCOMES
    }
    assert set(values.values()) == {0.0}


@pytest.mark.parametrize("kind", ["counter", "gauge", "histogram"])
def test_what_is_not_in_the_catalogue_cannot_be_made(kind: str) -> None:
    with pytest.raises(ValueError, match=f"no {kind} 'free_text'"):
        getattr(exposition, kind)("free_text", CollectorRegistry())


def test_no_module_makes_a_metric_of_its_own() -> None:
    """Whatever is exported is in the catalogue."""
    imported = re.compile(
        r"^\s*from prometheus_client(\.metrics)? import .*\b(Counter|Histogram|Summary|Info|Enum)\b", re.M
    )
    allowed = {ROOT / "fedvit" / "metrics" / "exposition.py"}
    folders = ("fedvit", "actors", "serve_apps", "edge_runtime")
    modules = {
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if imported.search(path.read_text())
    }
    assert modules == allowed
