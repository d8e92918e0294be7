"""Routes of the training loop, and of the settings and the aggregation mode, which may change while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, Response

from fedvit.aggregation.registry import check_mode, create_rule
from fedvit.api.system import OperationView
from fedvit.api.training import (
    AggregationModeRequest,
    AggregationModeView,
    ProgressView,
    RestartRequest,
    TrainingConfigRequest,
    TrainingConfigView,
)
from fedvit.cohort.conditions import progress_conditions
from fedvit.errors import ConflictError
from fedvit.ports import AggregatorPort
from fedvit.rounds.failures import last_failure
from fedvit.rounds.steering import (
    STALENESS_TOLERANCE,
    RoundSettings,
    aggregation_settings,
    change_aggregation_settings,
    change_round_settings,
    round_settings,
)
from fedvit.types import TrainingProgress
from serve_apps.control.http.access import OPERATOR, VIEWER, AuditNote, CallKey, Note
from serve_apps.control.http.route import route
from serve_apps.control.services import Services
from serve_apps.control.training.operations import accepted, progress_facts

_View = TypeVar("_View", TrainingConfigView, AggregationModeView)
IfMatch = Annotated[str | None, Header(description="The ETag that was read, or several; 412 if it has changed.")]


def add_training_routes(api: FastAPI, services: Services) -> None:
    """Add the routes of the training loop, its settings and the aggregation mode."""
    _add_loop(api, services)
    _add_settings(api, services)
    _add_aggregation_mode(api, services)


def _add_loop(api: FastAPI, services: Services) -> None:
    def steer(action: Callable[[AggregatorPort], TrainingProgress], note: AuditNote) -> ProgressView:
        aggregator = services.aggregator()
        note.before = progress_facts(aggregator.progress())
        progress = action(aggregator)
        note.after = progress_facts(progress)
        return progress_view(services, progress)

    @route(api, "GET /api/training/status", "training", VIEWER, 503)
    def status() -> ProgressView:
        """Where the training loop stands."""
        return progress_view(services, services.aggregator().progress())

    @route(api, "POST /api/training/start", "training", OPERATOR, 503, status_code=202)
    def start(note: Note) -> ProgressView:
        """Begin or continue the run that the settings describe; harmless when it is under way."""
        return steer(lambda aggregator: aggregator.start_training(), note)

    @route(api, "POST /api/training/stop", "training", OPERATOR, 503, status_code=202)
    def stop(note: Note) -> ProgressView:
        """End the loop after the round under way; a start continues it."""
        return steer(lambda aggregator: aggregator.stop_training(), note)

    @route(api, "POST /api/training/restart", "training", OPERATOR, 503, status_code=202)
    def restart(request: RestartRequest, response: Response, note: Note, call_key: CallKey) -> OperationView:
        """End the present run after its round and begin another from the base weights."""
        params = request.model_dump(exclude_none=True)
        aggregator = services.aggregator()
        note.before = progress_facts(aggregator.progress())
        return accepted(aggregator.submit("restart", params, call_key), response, note)


def _add_settings(api: FastAPI, services: Services) -> None:
    store, settings = services.store, services.settings

    @route(api, "GET /api/training/config", "training", VIEWER)
    def read_config(response: Response) -> TrainingConfigView:
        """What the next round goes by; the ETag names this revision."""
        return _config_view(round_settings(store, settings), response)

    @route(api, "POST /api/training/config", "training", OPERATOR, 412)
    def change_config(
        request: TrainingConfigRequest, response: Response, note: Note, if_match: IfMatch = None
    ) -> TrainingConfigView:
        """Change it for the next round and all after it, also after a restart."""
        note.before = asdict(round_settings(store, settings))
        revisions, wait_s = _revisions(if_match), request.wait_timeout
        changed = change_round_settings(
            store, settings, min_clients=request.min_clients, wait_timeout_s=wait_s, expected_revisions=revisions
        )
        note.after = asdict(changed)
        return _config_view(changed, response)


def progress_view(services: Services, progress: TrainingProgress) -> ProgressView:
    """The progress of training with its conditions. It needs no response from the accountant."""
    budget = None
    with contextlib.suppress(Exception):
        budget = services.accountant().budget()
    freeze, release = services.store.ledger.current_freeze(), services.store.releases.current()
    frozen, released = freeze.incident_id if freeze else None, (release.version, release.at) if release else None
    conditions = progress_conditions(progress, budget, frozen=frozen, release=released)
    return ProgressView.of(progress, conditions=conditions, failure=last_failure(services.store, progress.run_id))


def _config_view(settings: RoundSettings, response: Response) -> TrainingConfigView:
    return _with_etag(TrainingConfigView.of(settings, wait_timeout=settings.wait_timeout_s), response)


def _with_etag(view: _View, response: Response) -> _View:
    response.headers["ETag"] = view.etag
    return view


def _revisions(if_match: str | None) -> frozenset[int] | None:
    """The revisions that ``If-Match`` admits; None admits any. A tag of another form names none."""
    tags = [] if if_match is None else [tag.strip().strip('"') for tag in if_match.split(",")]
    if if_match is None or "*" in tags:
        return None
    return frozenset(int(tag) for tag in tags if tag.isdecimal() and len(tag) < 20)


def _add_aggregation_mode(api: FastAPI, services: Services) -> None:
    store = services.store

    @route(api, "GET /api/aggregation/mode", "training", VIEWER)
    def read_mode(response: Response) -> AggregationModeView:
        """Whom a round waits for; the ETag names this revision."""
        return _with_etag(AggregationModeView.of(aggregation_settings(store)), response)

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
        check_mode(create_rule(services.settings.training), request.mode, services.settings)
        note.before = asdict(aggregation_settings(store))
        changed = change_aggregation_settings(
            store, lambda now: replace(now, **_changes(request)), expected_revisions=_revisions(if_match)
        )
        note.after = asdict(changed)
        return _with_etag(AggregationModeView.of(changed), response)


def _changes(request: AggregationModeRequest) -> dict[str, Any]:
    """The settings to change, by name; null stands for the default."""
    changes = {name: getattr(request, name) for name in request.model_fields_set}
    if "staleness_tolerance" in changes and request.staleness_tolerance is None:
        changes["staleness_tolerance"] = STALENESS_TOLERANCE
    return changes
