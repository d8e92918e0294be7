"""Routes of the training loop: status, start, stop, restart, and the settings of a round."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Annotated

from fastapi import FastAPI, Header, Response

from fedvit.api.operations import OperationView
from fedvit.api.training import ProgressView, RestartRequest, TrainingConfigRequest, TrainingConfigView
from fedvit.cohort.conditions import progress_conditions
from fedvit.rounds.steering import RoundSettings, change_round_settings, round_settings
from fedvit.types import TrainingProgress
from serve_apps.control.http.access import OPERATOR, VIEWER, CallKey, Note
from serve_apps.control.http.route import route
from serve_apps.control.services import Services
from serve_apps.control.training.operations import accepted, progress_facts

IfMatch = Annotated[str | None, Header(description="The ETag that was read, or several; 412 if it has changed.")]


def add_training_routes(api: FastAPI, services: Services) -> None:
    """Add the routes of the training loop."""
    _add_loop(api, services)
    _add_settings(api, services)


def _add_loop(api: FastAPI, services: Services) -> None:
    @route(api, "GET /api/training/status", "training", VIEWER, 503)
    def status() -> ProgressView:
        """Where the training loop stands."""
        return progress_view(services, services.aggregator().progress())

    @route(api, "POST /api/training/start", "training", OPERATOR, 503, status_code=202)
    def start(note: Note) -> ProgressView:
        """Begin or continue the run that the settings describe; harmless when it is under way."""
        aggregator = services.aggregator()
        note.before = progress_facts(aggregator.progress())
        progress = aggregator.start_training()
        note.after = progress_facts(progress)
        return progress_view(services, progress)

    @route(api, "POST /api/training/stop", "training", OPERATOR, 503, status_code=202)
    def stop(note: Note) -> ProgressView:
        """End the loop after the round under way; a start continues it."""
        aggregator = services.aggregator()
        note.before = progress_facts(aggregator.progress())
        progress = aggregator.stop_training()
        note.after = progress_facts(progress)
        return progress_view(services, progress)

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
        changed = change_round_settings(
            store,
            settings,
            min_clients=request.min_clients,
            wait_timeout_s=request.wait_timeout,
            expected_revisions=revisions(if_match),
        )
        note.after = asdict(changed)
        return _config_view(changed, response)


def progress_view(services: Services, progress: TrainingProgress) -> ProgressView:
    """The progress of training with its conditions. It needs no response from the accountant."""
    budget = None
    with contextlib.suppress(Exception):
        budget = services.accountant().budget()
    freeze, release = services.store.ledger.current_freeze(), services.store.releases.current()
    conditions = progress_conditions(
        progress,
        budget,
        frozen=freeze.incident_id if freeze else None,
        release=(release.version, release.at) if release else None,
    )
    return ProgressView.of(progress, conditions=conditions)


def _config_view(settings: RoundSettings, response: Response) -> TrainingConfigView:
    view = TrainingConfigView.of(settings, wait_timeout=settings.wait_timeout_s)
    response.headers["ETag"] = view.etag
    return view


def revisions(if_match: str | None) -> frozenset[int] | None:
    """The revisions that ``If-Match`` admits; None admits any. A tag of another form names none."""
    tags = [] if if_match is None else [tag.strip().strip('"') for tag in if_match.split(",")]
    if if_match is None or "*" in tags:
        return None
    return frozenset(int(tag) for tag in tags if tag.isdecimal() and len(tag) < 20)
