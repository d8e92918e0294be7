"""Catalogue of metrics: the constructors, docs/reference/metrics.md and the tests are made from this table.

A label has few values, and they are listed here or made by this program: nothing that a caller or a vehicle sends
becomes one. Text that comes from outside is held against the list first, with :meth:`Label.of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from fedvit.types import Encoding, Severity

PREFIX = "fed_vit_autorl_"
OTHER = "other"

Kind = Literal["counter", "gauge", "histogram"]
OverProcesses = Literal["mostrecent", "livesum"]


@dataclass(frozen=True, slots=True)
class Label:
    """What tells series of one metric apart: its ``values``, or in words the ``origin`` that bounds them."""

    name: str
    values: tuple[str, ...] = ()
    origin: str = ""

    def of(self, value: str) -> str:
        """``value`` if it is one of the values, else :data:`OTHER`."""
        return value if value in self.values else OTHER


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``name`` is without the prefix.

    Attributes:
        over_processes: what a gauge says that several processes of a node set: the newest value, or the sum over those
            that live. Counters and histograms are summed, those of processes that ended among them.
        of_release: its series are about what serves now, and end with it; see :mod:`fedvit.metrics.releases`.
    """

    group: str
    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    over_processes: OverProcesses = "mostrecent"
    of_release: bool = False

    @property
    def full_name(self) -> str:
        """As Prometheus knows it."""
        return PREFIX + self.name

    def label(self, name: str) -> Label:
        """One of its labels.

        Raises:
            KeyError: it has no such label.
        """
        return {label.name: label for label in self.labels}[name]


# Dense around the alert's 100 ms, so that histogram_quantile interpolates little there.
INFERENCE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
REQUEST_BUCKETS_S = (0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
PHASE_BUCKETS_S = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0, 300.0, 1800.0)
STALENESS_BUCKETS = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0)

PHASES = ("drawing", "charging", "training", "committing", "releasing")
UPDATE_OUTCOMES = ("accepted", "failed", "refused", "quarantined", "rejected_answers")
INFERENCE_OUTCOMES = ("ok", "rejected", "unavailable", "failed")
QUEUES = ("operations", "clients_in_flight", "mailbox", "telemetry", "requests", "images")
COMPONENTS = ("store", "registry", "accountant", "aggregator", "client_proxies")
REFUSALS = (
    *("missing", "malformed", "invalid", "expired", "revoked", "issuer_unreachable", "no_scope"),
    *("foreign", "scope", "too_many_failures"),
)
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", OTHER)

_PRIVACY_UNIT = Label("privacy_unit", ("record", "client"))
_VERSION = Label("model_version", origin="the versions that are served now: one, during a switch two")

CATALOGUE = (
    Metric("training", "training_loss", "gauge", "nats", "Loss of the global model on the held-out images."),
    Metric("training", "training_accuracy", "gauge", "ratio", "Accuracy of the global model on the held-out images."),
    Metric("training", "training_rounds_total", "counter", "rounds", "Rounds committed since the system was started."),
    Metric(
        "training",
        "client_updates_total",
        "counter",
        "updates",
        "What became of the clients that a committed round asked: accepted; failed or silent; refused by update "
        "validation; kept out by an incident; rejected, because they were not asked or had answered already.",
        (Label("outcome", UPDATE_OUTCOMES),),
    ),
    Metric(
        "training",
        "update_staleness",
        "histogram",
        "versions",
        "How many versions were committed between the one that an accepted update started from and its round.",
        buckets=STALENESS_BUCKETS,
    ),
    Metric(
        "training",
        "round_duration_seconds",
        "histogram",
        "seconds",
        "How long the phases of a round took.",
        (Label("phase", PHASES),),
        PHASE_BUCKETS_S,
    ),
    Metric(
        "training",
        "update_bytes_total",
        "counter",
        "bytes",
        "Bytes of updates that came as bytes.",
        (Label("encoding", tuple(Encoding)),),
    ),
    Metric("fleet", "total_clients", "gauge", "clients", "Clients on the list: registered and not removed."),
    Metric("fleet", "active_clients", "gauge", "clients", "Clients on the list that no incident keeps out of rounds."),
    Metric(
        "fleet",
        "connected_clients",
        "gauge",
        "clients",
        "Clients on the list that are connected: hosted by a proxy that answers, or heard lately.",
    ),
    Metric(
        "fleet",
        "heartbeats_total",
        "counter",
        "heartbeats",
        "Heartbeats heard, by what the vehicle says of itself.",
        (Label("status", ("ok", "degraded")),),
    ),
    Metric(
        "privacy",
        "privacy_epsilon_remaining",
        "gauge",
        "epsilon",
        "Epsilon left to the most exposed unit, as of the scrape; 0 while the ledger is frozen.",
        (_PRIVACY_UNIT,),
    ),
    Metric(
        "privacy",
        "privacy_epsilon_spent",
        "gauge",
        "epsilon",
        "Epsilon spent by the most exposed unit in the present budget period.",
        (_PRIVACY_UNIT,),
    ),
    Metric(
        "serving",
        "inference_duration_seconds",
        "histogram",
        "seconds",
        "From image bytes to prediction, for the release that serves now.",
        (_VERSION,),
        INFERENCE_BUCKETS_S,
        of_release=True,
    ),
    Metric(
        "serving",
        "predictions_total",
        "counter",
        "answers",
        "Answers of the server's replicas by the index of the class; no vehicle counts any.",
        (_VERSION, Label("label", origin="the indices of the model's classes")),
        of_release=True,
    ),
    Metric(
        "serving",
        "inference_requests_total",
        "counter",
        "requests",
        "Inference requests: answered, refused for the caller's fault, without a model or room, or failed.",
        (Label("outcome", INFERENCE_OUTCOMES),),
    ),
    Metric(
        "data",
        "data_quality_score",
        "gauge",
        "score",
        "How far the data of the fleet can be relied on, 0 to 1; absent while nothing is known.",
    ),
    Metric(
        "data",
        "data_drift_score",
        "gauge",
        "score",
        "How far what the fleet sees has moved from the release's reference, 0 to 1; absent while nothing is known.",
    ),
    Metric(
        "access",
        "unauthorized_requests_total",
        "counter",
        "requests",
        "Requests refused for who asked.",
        (Label("reason", REFUSALS),),
    ),
    Metric(
        "access",
        "request_duration_seconds",
        "histogram",
        "seconds",
        "How long the control API took to answer.",
        (
            Label("method", METHODS),
            Label("route", origin="the templates of the control API's routes, and other"),
            Label("status", ("1xx", "2xx", "3xx", "4xx", "5xx")),
        ),
        REQUEST_BUCKETS_S,
    ),
    Metric(
        "health",
        "queue_depth",
        "gauge",
        "items",
        "What waits: operations; clients that were handed a task; messages in the mailbox; signs of life on their way "
        "to the store; requests that the control API is at; images that the inference replicas are at.",
        (Label("queue", QUEUES),),
        over_processes="livesum",
    ),
    Metric(
        "health",
        "component_healthy",
        "gauge",
        "boolean",
        "1 if the part answers as it should: the store reads, the registry has every artifact of the release, "
        "the accountant and the aggregator answer, every client proxy lives. As of the scrape.",
        (Label("component", COMPONENTS),),
    ),
    Metric(
        "health",
        "incidents_open",
        "gauge",
        "incidents",
        "Incidents of the log that are not resolved, as of the scrape.",
        (Label("severity", tuple(Severity)),),
    ),
    Metric("health", "store_bytes", "gauge", "bytes", "Size of the state database with its write-ahead log."),
)

BY_NAME = {metric.name: metric for metric in CATALOGUE}


def markdown() -> str:
    """docs/reference/metrics.md."""
    lines = [
        "# Metrics",
        "",
        f"Generated from `fedvit/metrics/catalogue.py` by `fedvit monitoring catalogue`. Every name begins with "
        f"`{PREFIX}`. A gauge has one value for all processes of a node. Counters and histograms are summed over them.",
        "",
    ]
    for group, metrics in groupby(CATALOGUE, lambda metric: metric.group):
        lines += [
            f"## {group.capitalize()}",
            "",
            "| metric | type | unit | labels | meaning |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(metric) for metric in metrics]
        lines.append("")
    return "\n".join(lines)


def _row(metric: Metric) -> str:
    labels = "; ".join(_described(label) for label in metric.labels) or "–"
    return f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {metric.meaning} |"


def _described(label: Label) -> str:
    return f"`{label.name}`: {', '.join(label.values) or label.origin}"


def sample_labels(metric: Metric) -> Iterator[dict[str, str]]:
    """The label sets of a metric that are known beforehand; one of examples where they are not."""
    sets: list[dict[str, str]] = [{}]
    for label in metric.labels:
        sets = [{**known, label.name: value} for known in sets for value in label.values or ("0",)]
    yield from sets
