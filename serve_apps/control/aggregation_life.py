"""Whom a round waits for, changed while training runs."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from fedvit.aggregation.registry import check_mode, create_rule
from fedvit.errors import ConflictError
from fedvit.rounds.steering import (
    STALENESS_TOLERANCE,
    AggregationSettings,
    aggregation_settings,
    change_aggregation_settings,
)
from serve_apps.control.access import OPERATOR, VIEWER, Note
from serve_apps.control.schemas import RequestBody
from serve_apps.control.services import Services
from serve_apps.control.training_life import IfMatch, revisions
from serve_apps.problems import documented

Mode = Literal["synchronous", "asynchronous"]


class AggregationModeRequest(RequestBody):
    """What is left out stays as it is; null puts the default back."""

    mode: Mode = Field(examples=["asynchronous"])
    staleness_tolerance: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        default=None, description="By how many versions an update may be late; 5 by default.", examples=[5]
    )
    buffer_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="With how many updates a round commits; half of those who take part by default."
    )

    def changes(self) -> dict[str, Any]:
        """The settings that shall change."""
        told = {name: getattr(self, name) for name in self.model_fields_set}
        if "staleness_tolerance" in told and self.staleness_tolerance is None:
            told["staleness_tolerance"] = STALENESS_TOLERANCE
        return told


class AggregationModeView(BaseModel):
    """What a round goes by; ``revision`` is the ETag. ``buffer_size`` null is half of those who take part."""

    mode: Mode
    staleness_tolerance: int
    buffer_size: int | None
    revision: int


def add_aggregation_routes(api: FastAPI, services: Services) -> None:
    """Steer aggregation."""
    store = services.store

    @api.get("/api/aggregation/mode", tags=["training"], dependencies=VIEWER)
    def read_mode(response: Response) -> AggregationModeView:
        """Whom a round waits for; the ETag names this revision."""
        return _told(aggregation_settings(store), response)

    @api.post("/api/aggregation/mode", tags=["training"], dependencies=OPERATOR, responses=documented(409, 412))
    def change_mode(
        request: AggregationModeRequest, response: Response, note: Note, if_match: IfMatch = None
    ) -> AggregationModeView:
        """Change it while training runs: asynchronous rounds commit with the first updates and let the slow be late.

        Nothing is lost on the way: the first synchronous round waits for all that are in flight and folds what is not
        too old.
        """
        if request.mode == "asynchronous" and services.settings.training.cohort.selection == "poisson":
            raise ConflictError(
                "The cohorts are Poisson samples, and privacy is amplified by that: nobody who is drawn may be late.",
                cure="Train with training.cohort.selection 'uniform' or 'all' and a cap on participations.",
            )
        check_mode(create_rule(services.settings.training), request.mode)
        note.before = asdict(aggregation_settings(store))
        changed = change_aggregation_settings(
            store, lambda now: replace(now, **request.changes()), expected_revisions=revisions(if_match)
        )
        note.after = asdict(changed)
        return _told(changed, response)


def _told(found: AggregationSettings, response: Response) -> AggregationModeView:
    response.headers["ETag"] = f'"{found.revision}"'
    return AggregationModeView(**asdict(found))
