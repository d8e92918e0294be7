"""The control REST API. Stateless: everything it knows is in the store and the actors, so replicas may be several."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI

from fedvit.config import AccessConfig
from fedvit.operations.mailbox import Mailbox
from serve_apps.control.fleet.clients import add_backup_routes, add_client_routes
from serve_apps.control.fleet.data_health import add_data_health_routes
from serve_apps.control.fleet.heartbeats import Heartbeats, add_heartbeat_routes
from serve_apps.control.fleet.liveness import Liveness
from serve_apps.control.fleet.remote_clients import add_remote_client_routes
from serve_apps.control.http.access import Guard
from serve_apps.control.http.admission import Admission
from serve_apps.control.http.audit import AuditQuota
from serve_apps.control.http.links import link_answers
from serve_apps.control.http.route import Control, install_control
from serve_apps.control.http.write_behind import Buffer, flushing
from serve_apps.control.incidents.incidents import add_incident_routes
from serve_apps.control.models.models import add_model_routes
from serve_apps.control.privacy.budget import add_privacy_routes
from serve_apps.control.privacy.emergency import add_emergency_routes
from serve_apps.control.services import Services
from serve_apps.control.system.reference import add_reference_routes
from serve_apps.control.system.system import HealthMetrics, add_system_routes
from serve_apps.control.training.operations import add_operation_routes
from serve_apps.control.training.training import add_training_routes
from serve_apps.problems import install_problem_handlers

__all__ = ["Services", "create_api"]

SPARE_THREADS = 8
"""Threads for the work that precedes admission: looking up tokens."""


def create_api(services: Services, guard: Guard | None = None) -> FastAPI:
    """The FastAPI application over the given services.

    Raises:
        ConfigError: the OIDC key set cannot be read.
    """
    guard = guard or Guard(services.settings, services.store, services.clock)
    heartbeats = Heartbeats(services.store, services.settings.fleet, services.clock)
    liveness = Liveness(services, heartbeats)
    mailbox = Mailbox(services.settings, services.store)
    access, quota = services.settings.access, AuditQuota(services.store, services.clock)
    api = FastAPI(
        title="fedvit control",
        version="0.1.0",
        description=__doc__ or "",
        lifespan=_lifespan(access, guard.tokens_used, heartbeats.seen, quota),
        # A redirect would name the host of the request's Host header, which may be any.
        redirect_slashes=False,
        # FastAPI's own ask for no token, and load scripts from another host; see add_reference_routes.
        openapi_url=None,
    )
    install_problem_handlers(api)
    install_control(api, Control(guard, services.store, Admission(access), quota, services.clock))
    add_reference_routes(api)
    add_system_routes(api, services, HealthMetrics(services, (guard.tokens_used, heartbeats.seen)))
    # Before the clients: its paths would be taken for one of them.
    add_data_health_routes(api, services, liveness)
    add_client_routes(api, services, heartbeats, liveness, mailbox)
    add_heartbeat_routes(api, services, heartbeats, mailbox)
    add_remote_client_routes(api, services, heartbeats)
    add_backup_routes(api, mailbox)
    add_model_routes(api, services)
    add_privacy_routes(api, services)
    add_training_routes(api, services)
    add_operation_routes(api, services)
    add_emergency_routes(api, services)
    add_incident_routes(api, services)
    link_answers(api)
    return api


def _lifespan(access: AccessConfig, *buffers: Buffer) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Flush the buffers; and let every admitted request have a thread, so that devices never wait in operators' way."""
    flush = flushing(*buffers)

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        limiter = current_default_thread_limiter()
        limiter.total_tokens = access.max_device_requests + access.max_operator_requests + SPARE_THREADS
        async with flush(api):
            yield

    return lifespan
