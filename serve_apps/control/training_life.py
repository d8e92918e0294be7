"""What is done to training while it runs: restart, and how patient a round is."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import FastAPI, Header, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedvit.rounds.steering import RoundSettings, change_round_settings, round_settings
from serve_apps.control.operations import KeyHeader, OperationView, accepted
from serve_apps.control.services import Services
from serve_apps.problems import documented

_NO_REVISION = -1


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RestartRequest(_Request):
    """Who may be drawn in the new run; left out, whoever may be drawn now."""

    client_selection: Literal["validated_only", "any"] | None = None


class TrainingConfigRequest(_Request):
    """What shall change; ``wait_timeout`` in seconds."""

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

    @api.post("/api/training/restart", tags=["training"], status_code=202, responses=documented(409, 422, 503))
    def restart(request: RestartRequest, response: Response, key: KeyHeader = None) -> OperationView:
        """End the present run after its round and begin another from the base weights."""
        params = request.model_dump(exclude_none=True)
        return accepted(services.aggregator().submit("restart", params, key), response)

    @api.get("/api/training/config", tags=["training"])
    def read_config(response: Response) -> TrainingConfigView:
        """What the next round goes by; the ETag names this revision."""
        return _told(round_settings(store, settings), response)

    @api.post("/api/training/config", tags=["training"], responses=documented(412, 422))
    def change_config(
        request: TrainingConfigRequest,
        response: Response,
        if_match: Annotated[str | None, Header(description="The ETag that was read; 412 if it has changed.")] = None,
    ) -> TrainingConfigView:
        """Change it for the next round and all after it, also after a restart."""
        changed = change_round_settings(
            store,
            settings,
            min_clients=request.min_clients,
            wait_timeout_s=request.wait_timeout,
            expected_revision=_revision(if_match),
        )
        return _told(changed, response)


def _told(found: RoundSettings, response: Response) -> TrainingConfigView:
    response.headers["ETag"] = f'"{found.revision}"'
    return TrainingConfigView(min_clients=found.min_clients, wait_timeout=found.wait_timeout_s, revision=found.revision)


def _revision(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    digits = if_match.strip().strip('"')
    return int(digits) if digits.isdecimal() else _NO_REVISION
