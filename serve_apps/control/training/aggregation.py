"""Routes of the aggregation mode, which may change while training runs."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from fastapi import FastAPI, Response

from fedvit.aggregation.registry import check_mode, create_rule
from fedvit.api.training import AggregationModeRequest, AggregationModeView
from fedvit.errors import ConflictError
from fedvit.rounds.steering import (
    STALENESS_TOLERANCE,
    AggregationSettings,
    aggregation_settings,
    change_aggregation_settings,
)
from serve_apps.control.http.access import OPERATOR, VIEWER, Note
from serve_apps.control.http.route import route
from serve_apps.control.services import Services
from serve_apps.control.training.training import IfMatch, revisions


def add_aggregation_routes(api: FastAPI, services: Services) -> None:
    """Add the routes of the aggregation mode."""
    store = services.store

    @route(api, "GET /api/aggregation/mode", "training", VIEWER)
    def read_mode(response: Response) -> AggregationModeView:
        """Whom a round waits for; the ETag names this revision."""
        return _view(aggregation_settings(store), response)

    @route(api, "POST /api/aggregation/mode", "training", OPERATOR, 409, 412)
    def change_mode(
        request: AggregationModeRequest, response: Response, note: Note, if_match: IfMatch = None
    ) -> AggregationModeView:
        """Change it while training runs: asynchronous rounds commit with the first updates and let the slow be late.

        Nothing is lost on the way: the first synchronous round waits for all that are in flight and folds what is not
        too old.
        """
        if request.mode == "asynchronous" and services.settings.training.cohort.selection == "poisson":
            raise ConflictError(
                "The cohorts are Poisson samples, which amplifies privacy: no drawn client may answer late.",
                cure="Train with training.cohort.selection 'uniform' or 'all' and a cap on participations.",
            )
        check_mode(create_rule(services.settings.training), request.mode)
        note.before = asdict(aggregation_settings(store))
        changed = change_aggregation_settings(
            store, lambda now: replace(now, **_changes(request)), expected_revisions=revisions(if_match)
        )
        note.after = asdict(changed)
        return _view(changed, response)


def _changes(request: AggregationModeRequest) -> dict[str, Any]:
    """The settings to change, by name; null stands for the default."""
    changes = {name: getattr(request, name) for name in request.model_fields_set}
    if "staleness_tolerance" in changes and request.staleness_tolerance is None:
        changes["staleness_tolerance"] = STALENESS_TOLERANCE
    return changes


def _view(settings: AggregationSettings, response: Response) -> AggregationModeView:
    view = AggregationModeView.of(settings)
    response.headers["ETag"] = view.etag
    return view
