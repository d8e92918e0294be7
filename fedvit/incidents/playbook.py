"""What the runbook says about each alert, as a table: which section, which commands, which calls.

Commands stand here as docs/runbook.md prints them, character by character; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedvit.types import CLIENT_ID, RemediationAction

DEVICE = "<device-id>"
RUNBOOK = "docs/runbook.md"
BREACH_ALERT = "PrivacyBreach"
"""What an incident is called that nobody's alert rule saw: somebody reported a breach."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the control API; a path with ``{client_id}`` is about one client."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None

    @property
    def about_a_client(self) -> bool:
        """Whether it has to be told which client."""
        return "{client_id}" in self.path


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do. ``command`` is what an operator types, ``call`` what that asks of the control API, if anything.

    ``name`` is a :class:`~fedvit.types.RemediationAction` where it may ever be automatic.
    """

    name: str
    command: str
    call: Call | None = None

    @property
    def action(self) -> RemediationAction | None:
        """The action, where this may ever be automatic."""
        return RemediationAction(self.name) if self.name in list(RemediationAction) else None


@dataclass(frozen=True, slots=True)
class Play:
    """What to do about an alert; ``section`` is the anchor of its section in the runbook."""

    section: str
    steps: tuple[Step, ...]


def _posted(path: str, body: str | None = None, *headers: str) -> str:
    lines = [f'curl -X POST "http://localhost:8000{path}"', *(f'-H "{header}"' for header in headers)]
    return " \\\n  ".join([*lines, *([] if body is None else [f"-d '{body}'"])])


_JSON = "Content-Type: application/json"
RESTART = Step(
    RemediationAction.RESTART_VALIDATED_ONLY,
    _posted("/api/training/restart", '{"client_selection": "validated_only"}', _JSON),
    Call("POST", "/api/training/restart", {"client_selection": "validated_only"}),
)
RETRAIN = Step(
    RemediationAction.FULL_RETRAIN,
    _posted("/api/model/retrain", '{"strategy": "full_retrain"}'),
    Call("POST", "/api/model/retrain", {"strategy": "full_retrain"}),
)
REMOVE = Step(
    RemediationAction.REMOVE_CLIENT,
    f'curl -X DELETE "http://localhost:8000/api/clients/{DEVICE}"',
    Call("DELETE", "/api/clients/{client_id}"),
)
STOP = Step(RemediationAction.STOP_TRAINING, _posted("/api/training/stop"), Call("POST", "/api/training/stop"))
RESET = Step(
    "privacy_reset",
    _posted(
        "/api/privacy/reset-budget",
        '{"new_epsilon": 1.0, "justification": "..."}',
        "Authorization: Bearer <admin-token>",
    ),
    Call("POST", "/api/privacy/reset-budget", {"new_epsilon": 1.0, "justification": "..."}),
)
OPTIMIZE = Step(
    RemediationAction.OPTIMIZE_EDGE,
    _posted("/api/edge/optimize", '{"strategy": "quantization", "target_latency": 50}'),
    Call("POST", "/api/edge/optimize", {"strategy": "quantization", "target_latency": 50}),
)
SWITCH = Step(
    RemediationAction.SWITCH_TO_EDGE_OPTIMIZED,
    _posted("/api/model/switch", '{"variant": "edge_optimized"}'),
    Call("POST", "/api/model/switch", {"variant": "edge_optimized"}),
)
ASYNCHRONOUS = Step(
    RemediationAction.ASYNCHRONOUS_MODE,
    _posted("/api/aggregation/mode", '{"mode": "asynchronous", "staleness_tolerance": 5}'),
    Call("POST", "/api/aggregation/mode", {"mode": "asynchronous", "staleness_tolerance": 5}),
)
FEWER = Step(
    RemediationAction.FEWER_CLIENTS,
    _posted("/api/training/config", '{"min_clients": 10, "wait_timeout": 300}'),
    Call("POST", "/api/training/config", {"min_clients": 10, "wait_timeout": 300}),
)
BACKUP = Step(
    RemediationAction.ENABLE_BACKUP_CHANNEL,
    _posted("/api/communication/enable-backup"),
    Call("POST", "/api/communication/enable-backup"),
)
BREACH = Step(
    "privacy_breach",
    _posted(
        "/api/emergency/privacy-breach",
        "{\n"
        '    "incident_id": "PB-$(date +%Y%m%d-%H%M%S)",\n'
        '    "affected_clients": ["client1", "client2"],\n'
        '    "breach_type": "data_exposure",\n'
        '    "immediate_actions": ["stop_training", "isolate_data"]\n'
        "  }",
        "Authorization: Bearer <emergency-token>",
    ),
    Call(
        "POST",
        "/api/emergency/privacy-breach",
        {
            "incident_id": "PB-$(date +%Y%m%d-%H%M%S)",
            "affected_clients": ["client1", "client2"],
            "breach_type": "data_exposure",
            "immediate_actions": ["stop_training", "isolate_data"],
        },
    ),
)
STAND_DOWN = Step(
    "stand_down",
    _posted(
        "/api/emergency/stand-down",
        '{"incident_id": "<incident-id>", "justification": "The review found no further exposure."}',
        "Authorization: Bearer <emergency-token>",
    ),
    Call(
        "POST",
        "/api/emergency/stand-down",
        {"incident_id": "<incident-id>", "justification": "The review found no further exposure."},
    ),
)

_DOWN, _LOSS, _PARTITION, _BREACH = (
    "1-federated-server-down",
    "2-high-training-loss",
    "6-network-partition",
    "privacy-breach-response",
)
PLAYBOOK: Mapping[str, Play] = {
    "ServiceDown": Play(_DOWN, (Step("restart_service", "make down && make up"),)),
    "ComponentUnhealthy": Play(_DOWN, (Step("restart_service", "make down && make up"),)),
    "HighTrainingLoss": Play(_LOSS, (RESTART, RETRAIN)),
    "ModelConvergenceStalled": Play(_LOSS, (RESTART,)),
    "LowDataQuality": Play(_LOSS, (RESTART,)),
    "DataDrift": Play(_LOSS, (RETRAIN,)),
    "EdgeDeviceOffline": Play("3-edge-device-offline", (REMOVE,)),
    "PrivacyBudgetExhausted": Play("4-privacy-budget-exhausted", (STOP, RESET)),
    "EdgeHighInferenceLatency": Play("5-high-inference-latency", (OPTIMIZE, SWITCH)),
    "NetworkPartition": Play(_PARTITION, (ASYNCHRONOUS, FEWER, BACKUP)),
    "LowClientParticipation": Play(_PARTITION, (FEWER, BACKUP)),
    "UnauthorizedAccess": Play(_BREACH, (BREACH,)),
    BREACH_ALERT: Play(_BREACH, (STAND_DOWN,)),
}
NOTHING = Play("common-incidents", ())


def play_of(alertname: str) -> Play:
    """What to do about an alert; for one that the runbook does not know, no step."""
    return PLAYBOOK.get(alertname, NOTHING)


def client_of(labels: Mapping[str, str]) -> str | None:
    """The client that an alert is about, if its labels name one.

    What no client can be called is none: it would become part of a command that somebody types.
    """
    named = (labels.get(name, "") for name in ("client_id", "device_id", "device"))
    return next((name for name in named if re.fullmatch(CLIENT_ID, name)), None)
