"""Closed sets of values in requests. Without pydantic, so that the command line can offer them in its help."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

AggregationMode = Literal["synchronous", "asynchronous"]
ClientSelection = Literal["validated_only", "any"]
HeartbeatStatus = Literal["ok", "degraded"]
IncidentStatus = Literal["open", "resolved"]
OptimizeStrategy = Literal["quantization", "lighter_variant"]
RemoteKind = Literal["remote", "silo"]
RetrainStrategy = Literal["full_retrain", "fine_tune"]
ShutdownMode = Literal["graceful", "force"]


class ImmediateAction(StrEnum):
    """What a report may ask for. All but the roll-back happen unasked."""

    STOP_TRAINING = "stop_training"
    ISOLATE_DATA = "isolate_data"
    ROLLBACK_MODEL = "rollback_model"
    FREEZE_LEDGER = "freeze_ledger"
    REVOKE_CREDENTIALS = "revoke_credentials"


class Section(StrEnum):
    """What people know of an incident, and note: where in the report it goes. ``remark`` is a line of the timeline."""

    REMARK = "remark"
    ROOT_CAUSE = "root_cause"
    BUSINESS_IMPACT = "business_impact"
    RESOLUTION = "resolution"
    PREVENTION = "prevention"
    ACTION_ITEM = "action_item"
