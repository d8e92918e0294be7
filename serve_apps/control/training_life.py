"""What is done to training while it runs: restart, and how patient a round is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import FastAPI, Header, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedvit.rounds.steering import RoundSettings, change_round_settings, round_settings
from serve_apps.control.access import OPERATOR, VIEWER, CallKey, Note
from serve_apps.control.operations import OperationView, accepted, standing_of
from serve_apps.control.schemas import RequestBody
from serve_apps.control.services import Services
from serve_apps.problems import documented

IfMatch = Annotated[str | None, Header(description="The ETag that was read, or several; 412 if it has changed.")]


class RestartRequest(RequestBody):
    """Who may be drawn in the new run; left out, whoever may be drawn now."""

    client_selection: Literal["validated_only", "any"] | None = None


class TrainingConfigRequest(RequestBody):
    """What shall change; ``wait_timeout`` in seconds."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["min_clients"], "properties": {"min_clients": {"type": "integer"}}},
                {"required": ["wait_timeout"], "properties": {"wait_timeout": {"type": "number"}}},
            ],
            "examples": [{"min_clients": 5, "wait_timeout": 300}],
        }
    )
    min_clients: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    wait_timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> TrainingConfigRequest:
        if self.min_clients is None and self.wait_timeout is None:
            raise ValueError("give min_clients, wait_timeout or both")
        return self


class TrainingConfigView(BaseModel):
    """What the next round goes by; ``wait_timeout`` in seconds. ``revision`` is the ETag."""

    min_clients: int
    wait_timeout: float
    revision: int


def add_training_life_routes(api: FastAPI, services: Services) -> None:
    """Steer training."""
    store, settings = services.store, services.settings

    @api.post(
        "/api/training/restart", tags=["training"], status_code=202, dependencies=OPERATOR, responses=documented(503)
    )
    def restart(request: RestartRequest, response: Response, note: Note, call_key: CallKey) -> OperationView:
        """End the present run after its round and begin another from the base weights."""
        params = request.model_dump(exclude_none=True)
        aggregator = services.aggregator()
        note.before = standing_of(aggregator.progress())
        return accepted(aggregator.submit("restart", params, call_key), response, note)

    @api.get("/api/training/config", tags=["training"], dependencies=VIEWER)
    def read_config(response: Response) -> TrainingConfigView:
        """What the next round goes by; the ETag names this revision."""
        return _told(round_settings(store, settings), response)

    @api.post("/api/training/config", tags=["training"], dependencies=OPERATOR, responses=documented(412))
    def change_config(
        request: TrainingConfigRequest,
        response: Response,
        note: Note,
        if_match: IfMatch = None,
    ) -> TrainingConfigView:
        """Change it for the next round and all after it, also after a restart."""
        note.before = asdict(round_settings(store, settings))
        changed = change_round_settings(
            store,
            settings,
            min_clients=request.min_clients,
            wait_timeout_s=request.wait_timeout,
            expected_revisions=revisions(if_match),
        )
        note.after = asdict(changed)
        return _told(changed, response)


def _told(found: RoundSettings, response: Response) -> TrainingConfigView:
    response.headers["ETag"] = f'"{found.revision}"'
    return TrainingConfigView(min_clients=found.min_clients, wait_timeout=found.wait_timeout_s, revision=found.revision)


def revisions(if_match: str | None) -> frozenset[int] | None:
    """The revisions that ``If-Match`` admits; None admits any. A tag that was never ours names none."""
    tags = [] if if_match is None else [tag.strip().strip('"') for tag in if_match.split(",")]
    if if_match is None or "*" in tags:
        return None
    return frozenset(int(tag) for tag in tags if tag.isdecimal() and len(tag) < 20)
