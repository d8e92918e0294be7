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


def _quantile(quantile: float, metric: str, by: str) -> str:
    return f"histogram_quantile({quantile}, sum by ({by}, le) (rate(@{metric}_bucket[{RATE}])))"


def _rates(metric: str, *by: str) -> dict[str, str]:
    return {" ".join(f"{{{{{label}}}}}" for label in by): f"sum by ({', '.join(by)}) (rate(@{metric}[{RATE}]))"}


# Pages of panels by name, which is also that of the file and the URL.
DASHBOARDS: dict[str, tuple[Panel, ...]] = {
    "training": (
        Panel("Held-out loss", "none", {"loss": "@training_loss"}),
        Panel("Held-out accuracy", "percentunit", {"accuracy": "@training_accuracy"}),
        Panel("Rounds", "none", {"a minute": f"60 * sum(rate(@training_rounds_total[{RATE}]))"}),
        Panel("Clients asked, by outcome", "none", _rates("client_updates_total", "outcome")),
        Panel("Phases of a round, p95", "s", {"{{phase}}": _quantile(0.95, "round_duration_seconds", "phase")}),
        Panel("Staleness of accepted updates, p95", "none", {"versions": _quantile(0.95, "update_staleness", "job")}),
        Panel("Updates as bytes", "Bps", _rates("update_bytes_total", "encoding")),
        Panel("Clients at work", "none", {"clients": '@queue_depth{queue="clients_in_flight"}'}),
    ),
    "privacy": (
        Panel("Epsilon left", "none", {"{{privacy_unit}}": "@privacy_epsilon_remaining"}),
        Panel("Epsilon spent in this period", "none", {"{{privacy_unit}}": "@privacy_epsilon_spent"}),
        Panel(
            "Share of the budget spent",
            "percentunit",
            {"{{privacy_unit}}": "@privacy_epsilon_spent / (@privacy_epsilon_spent + @privacy_epsilon_remaining)"},
        ),
        Panel(
            "Epsilon an hour", "none", {"{{privacy_unit}}": "clamp_min(3600 * deriv(@privacy_epsilon_spent[10m]), 0)"}
        ),
        Panel("Requests refused by access control", "reqps", _rates("unauthorized_requests_total", "reason")),
        Panel("Sessions of secure aggregation", "none", _rates("secure_sessions_total", "outcome")),
        Panel(
            "Clients of a secure sum",
            "none",
            {
                "participants": "@secure_participants",
                "survivors": "@secure_survivors",
                "fewest survivors": "@secure_min_survivors",
            },
        ),
        Panel("Dropouts of secure aggregation, by phase", "none", _rates("secure_dropouts_total", "phase")),
        Panel(
            "Phases of secure aggregation, p95",
            "s",
            {"{{phase}}": _quantile(0.95, "secure_phase_duration_seconds", "phase")},
        ),
        Panel("Ring width of a secure sum", "none", {"bits": "@secure_ring_bits"}),
    ),
    "fleet": (
        Panel(
            "Clients",
            "none",
            {"listed": "@total_clients", "active": "@active_clients", "connected": "@connected_clients"},
        ),
        Panel("Connected share", "percentunit", {"share": "@connected_clients / @total_clients"}),
        Panel("Heartbeats", "reqps", _rates("heartbeats_total", "status")),
        Panel("Data quality", "percentunit", {"score": "@data_quality_score"}),
        Panel("Data drift", "percentunit", {"score": "@data_drift_score"}),
        Panel("Messages in the mailbox", "none", {"messages": '@queue_depth{queue="mailbox"}'}),
    ),
    "edge": (
        Panel("Reachable edges", "none", {"{{instance}}": 'up{job="fed-edge"}'}),
        Panel("Latency, p50", "s", {"{{instance}}": _quantile(0.5, "inference_duration_seconds", "instance")}),
        Panel("Latency, p95", "s", {"{{instance}}": _quantile(0.95, "inference_duration_seconds", "instance")}),
        Panel(
            "Latency since the start of the release, p95",
            "s",
            {"{{instance}} {{model_version}}": "histogram_quantile(0.95, @inference_duration_seconds_bucket)"},
        ),
        Panel("Images, by outcome", "reqps", _rates("inference_requests_total", "instance", "outcome")),
        Panel(
            "Releases served",
            "none",
            {"{{model_version}}": "count by (model_version) (@inference_duration_seconds_count)"},
        ),
        Panel("Waiting images", "none", {"{{instance}}": '@queue_depth{queue="images"}'}),
    ),
    "serving": (
        Panel("Requests to the control API", "reqps", _rates("request_duration_seconds_count", "status")),
        Panel("Control API, p95", "s", {"{{route}}": _quantile(0.95, "request_duration_seconds", "route")}),
        Panel(
            "Failed inference requests",
            "percentunit",
            {
                "share": f'sum(rate(@inference_requests_total{{outcome=~"unavailable|failed"}}[{RATE}])) '
                f'/ sum(rate(@inference_requests_total{{outcome!="rejected"}}[{RATE}]))'
            },
        ),
        Panel("Answers, by class", "reqps", _rates("predictions_total", "label")),
        Panel("Healthy components", "bool_yes_no", {"{{component}}": "@component_healthy"}),
        Panel("Queues", "none", {"{{queue}}": "sum by (queue) (@queue_depth)"}),
        Panel("State database", "bytes", {"size": "@store_bytes"}),
        Panel("Firing alerts", "none", {"{{severity}}": 'count by (severity) (ALERTS{alertstate="firing"})'}),
        Panel("Open incidents", "none", {"{{severity}}": "sum by (severity) (@incidents_open)"}),
        Panel("Duration of scrapes", "s", {"{{job}} {{instance}}": "scrape_duration_seconds"}),
    ),
}


def as_json(name: str) -> str:
    """A dashboard as Grafana imports it."""
    page = {
        "uid": f"fedvit-{name}",
        "title": f"fedvit: {name}",
        "tags": ["fedvit"],
        "schemaVersion": 38,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "panels": [_panel(number, panel) for number, panel in enumerate(DASHBOARDS[name])],
    }
    return json.dumps(page, indent=1) + "\n"


def write_dashboards(folder: Path) -> list[Path]:
    """Write every dashboard into ``folder``; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json" for name in DASHBOARDS]
    for path in files:
        path.write_text(as_json(path.stem))
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
