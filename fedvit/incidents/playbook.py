"""Table of alerts: the section of the runbook, its commands and their API calls.

A test compares the commands with those in docs/runbook.md, character by character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedvit.types import CLIENT_ID, RemediationAction

DEVICE = "<device-id>"
RUNBOOK = "docs/runbook.md"
BREACH_ALERT = "PrivacyBreach"
"""The alert name of an incident that began with a reported breach instead of an alert rule."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the control API; a path with ``{client_id}`` is about one client."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None

    @property
    def about_a_client(self) -> bool:
        """Whether the path needs a client's id."""
        return "{client_id}" in self.path


@dataclass(frozen=True, slots=True)
class Step:
    """One step: ``command`` is the command line for an operator, ``call`` its call of the control API, if any.

    ``name`` is a :class:`~fedvit.types.RemediationAction` if the step may be automatic.
    """

    name: str
    command: str
    call: Call | None = None

    @property
    def action(self) -> RemediationAction | None:
        """The action, if the step may be automatic."""
        return RemediationAction(self.name) if self.name in list(RemediationAction) else None


@dataclass(frozen=True, slots=True)
class Play:
    """The steps for an alert; ``section`` is the anchor of its section in the runbook."""

    section: str
    steps: tuple[Step, ...]


def _step(name: str, path: str, body: str | None = None, *headers: str) -> Step:
    """A step whose command is a curl POST; the call's body is parsed from the command's."""
    lines = [f'curl -X POST "http://localhost:8000{path}"', *(f'-H "{header}"' for header in headers)]
    command = " \\\n  ".join([*lines, *([] if body is None else [f"-d '{body}'"])])
    return Step(name, command, Call("POST", path, None if body is None else json.loads(body)))


_EMERGENCY = "Authorization: Bearer <emergency-token>"
RESTART = _step(
    RemediationAction.RESTART_VALIDATED_ONLY,
    "/api/training/restart",
    '{"client_selection": "validated_only"}',
    "Content-Type: application/json",
)
RETRAIN = _step(RemediationAction.FULL_RETRAIN, "/api/model/retrain", '{"strategy": "full_retrain"}')
REMOVE = Step(
    RemediationAction.REMOVE_CLIENT,
    f'curl -X DELETE "http://localhost:8000/api/clients/{DEVICE}"',
    Call("DELETE", "/api/clients/{client_id}"),
)
STOP = _step(RemediationAction.STOP_TRAINING, "/api/training/stop")
RESET = _step(
    "privacy_reset",
    "/api/privacy/reset-budget",
    '{"new_epsilon": 1.0, "justification": "..."}',
    "Authorization: Bearer <admin-token>",
)
OPTIMIZE = _step(
    RemediationAction.OPTIMIZE_EDGE, "/api/edge/optimize", '{"strategy": "quantization", "target_latency": 50}'
)
SWITCH = _step(RemediationAction.SWITCH_TO_EDGE_OPTIMIZED, "/api/model/switch", '{"variant": "edge_optimized"}')
ASYNCHRONOUS = _step(
    RemediationAction.ASYNCHRONOUS_MODE,
    "/api/aggregation/mode",
    '{"mode": "asynchronous", "staleness_tolerance": 5}',
)
FEWER = _step(RemediationAction.FEWER_CLIENTS, "/api/training/config", '{"min_clients": 10, "wait_timeout": 300}')
BACKUP = _step(RemediationAction.ENABLE_BACKUP_CHANNEL, "/api/communication/enable-backup")
BREACH = _step(
    "privacy_breach",
    "/api/emergency/privacy-breach",
    "{\n"
    '    "incident_id": "PB-$(date +%Y%m%d-%H%M%S)",\n'
    '    "affected_clients": ["client1", "client2"],\n'
    '    "breach_type": "data_exposure",\n'
    '    "immediate_actions": ["stop_training", "isolate_data"]\n'
    "  }",
    _EMERGENCY,
)
STAND_DOWN = _step(
    "stand_down",
    "/api/emergency/stand-down",
    '{"incident_id": "<incident-id>", "justification": "The review found no further exposure."}',
    _EMERGENCY,
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
    "SecureAggregationFailing": Play("7-secure-aggregation-failing", (STOP,)),
    "UnauthorizedAccess": Play(_BREACH, (BREACH,)),
    BREACH_ALERT: Play(_BREACH, (STAND_DOWN,)),
}
NOTHING = Play("common-incidents", ())


def play_of(alertname: str) -> Play:
    """The steps for an alert; none for an alert that the runbook does not contain."""
    return PLAYBOOK.get(alertname, NOTHING)


def client_of(labels: Mapping[str, str]) -> str | None:
    """The id of the client that an alert's labels name, if any.

    Invalid ids are ignored, because the id becomes part of a command line.
    """
    named = (labels.get(name, "") for name in ("client_id", "device_id", "device"))
    return next((name for name in named if re.fullmatch(CLIENT_ID, name)), None)
