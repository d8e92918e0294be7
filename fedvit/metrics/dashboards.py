"""Grafana dashboards as a table of panels; ``fedvit monitoring dashboards FOLDER`` writes them for Grafana."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvit.metrics.catalogue import PREFIX

SOURCE = "fedvit-prometheus"
WIDTH, HEIGHT, ACROSS = 8, 8, 3
RATE = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph. ``queries`` are PromQL by legend; ``@`` stands for the prefix of fedvit's metrics."""

    title: str
    unit: str
    queries: dict[str, str]

    def expressions(self) -> list[str]:
        """The queries with prefix, and with Grafana's variable for the rate interval."""
        return [query.replace("@", PREFIX) for query in self.queries.values()]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page of panels; the name is also that of its file and its URL."""

    name: str
    panels: tuple[Panel, ...]


def _p95(metric: str, by: str) -> str:
    return f"histogram_quantile(0.95, sum by ({by}, le) (rate(@{metric}_bucket[{RATE}])))"


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate(@{metric}[{RATE}]))"


DASHBOARDS = (
    Dashboard(
        "training",
        (
            Panel("Held-out loss", "none", {"loss": "@training_loss"}),
            Panel("Held-out accuracy", "percentunit", {"accuracy": "@training_accuracy"}),
            Panel("Rounds", "none", {"a minute": f"60 * sum(rate(@training_rounds_total[{RATE}]))"}),
            Panel("Clients asked, by outcome", "none", {"{{outcome}}": _rate("client_updates_total", "outcome")}),
            Panel("Phases of a round, p95", "s", {"{{phase}}": _p95("round_duration_seconds", "phase")}),
            Panel("Staleness of accepted updates, p95", "none", {"versions": _p95("update_staleness", "job")}),
            Panel("Updates as bytes", "Bps", {"{{encoding}}": _rate("update_bytes_total", "encoding")}),
            Panel("Clients at work", "none", {"clients": '@queue_depth{queue="clients_in_flight"}'}),
        ),
    ),
    Dashboard(
        "privacy",
        (
            Panel("Epsilon left", "none", {"{{privacy_unit}}": "@privacy_epsilon_remaining"}),
            Panel("Epsilon spent in this period", "none", {"{{privacy_unit}}": "@privacy_epsilon_spent"}),
            Panel(
                "Share of the budget spent",
                "percentunit",
                {"{{privacy_unit}}": "@privacy_epsilon_spent / (@privacy_epsilon_spent + @privacy_epsilon_remaining)"},
            ),
            Panel(
                "Epsilon an hour",
                "none",
                {"{{privacy_unit}}": "clamp_min(3600 * deriv(@privacy_epsilon_spent[10m]), 0)"},
            ),
            Panel(
                "Requests refused by access control",
                "reqps",
                {"{{reason}}": _rate("unauthorized_requests_total", "reason")},
            ),
        ),
    ),
    Dashboard(
        "fleet",
        (
            Panel(
                "Clients",
                "none",
                {"listed": "@total_clients", "active": "@active_clients", "connected": "@connected_clients"},
            ),
            Panel("Connected share", "percentunit", {"share": "@connected_clients / @total_clients"}),
            Panel("Heartbeats", "reqps", {"{{status}}": _rate("heartbeats_total", "status")}),
            Panel("Data quality", "percentunit", {"score": "@data_quality_score"}),
            Panel("Data drift", "percentunit", {"score": "@data_drift_score"}),
            Panel("Messages in the mailbox", "none", {"messages": '@queue_depth{queue="mailbox"}'}),
        ),
    ),
    Dashboard(
        "edge",
        (
            Panel("Reachable edges", "none", {"{{instance}}": 'up{job="fed-edge"}'}),
            Panel(
                "Latency, p50",
                "s",
                {"{{instance}}": _p95("inference_duration_seconds", "instance").replace("0.95", "0.5")},
            ),
            Panel("Latency, p95", "s", {"{{instance}}": _p95("inference_duration_seconds", "instance")}),
            Panel(
                "Latency since the start of the release, p95",
                "s",
                {"{{instance}} {{model_version}}": "histogram_quantile(0.95, @inference_duration_seconds_bucket)"},
            ),
            Panel(
                "Images, by outcome",
                "reqps",
                {"{{instance}} {{outcome}}": _rate("inference_requests_total", "instance, outcome")},
            ),
            Panel(
                "Releases served",
                "none",
                {"{{model_version}}": "count by (model_version) (@inference_duration_seconds_count)"},
            ),
            Panel("Waiting images", "none", {"{{instance}}": '@queue_depth{queue="images"}'}),
        ),
    ),
    Dashboard(
        "serving",
        (
            Panel(
                "Requests to the control API",
                "reqps",
                {"{{status}}": _rate("request_duration_seconds_count", "status")},
            ),
            Panel("Control API, p95", "s", {"{{route}}": _p95("request_duration_seconds", "route")}),
            Panel(
                "Failed inference requests",
                "percentunit",
                {
                    "share": f'sum(rate(@inference_requests_total{{outcome=~"unavailable|failed"}}[{RATE}])) '
                    f'/ sum(rate(@inference_requests_total{{outcome!="rejected"}}[{RATE}]))'
                },
            ),
            Panel("Answers, by class", "reqps", {"{{label}}": _rate("predictions_total", "label")}),
            Panel("Healthy components", "bool_yes_no", {"{{component}}": "@component_healthy"}),
            Panel("Queues", "none", {"{{queue}}": "sum by (queue) (@queue_depth)"}),
            Panel("State database", "bytes", {"size": "@store_bytes"}),
            Panel("Firing alerts", "none", {"{{severity}}": 'count by (severity) (ALERTS{alertstate="firing"})'}),
            Panel("Open incidents", "none", {"{{severity}}": "sum by (severity) (@incidents_open)"}),
            Panel("Duration of scrapes", "s", {"{{job}} {{instance}}": "scrape_duration_seconds"}),
        ),
    ),
)


def as_json(dashboard: Dashboard) -> str:
    """The dashboard as Grafana imports it."""
    title = f"fedvit: {dashboard.name}"
    page = {
        "uid": f"fedvit-{dashboard.name}",
        "title": title,
        "tags": ["fedvit"],
        "schemaVersion": 38,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "panels": [_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }
    return json.dumps(page, indent=1) + "\n"


def write_dashboards(folder: Path) -> list[Path]:
    """Write every dashboard into ``folder``; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{dashboard.name}.json" for dashboard in DASHBOARDS]
    for path, dashboard in zip(files, DASHBOARDS, strict=True):
        path.write_text(as_json(dashboard))
    return files


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, ACROSS)
    source = {"type": "prometheus", "uid": SOURCE}
    legends = zip(panel.queries, panel.expressions(), strict=True)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": source, "expr": expression, "legendFormat": legend}
            for place, (legend, expression) in enumerate(legends)
        ],
    }
