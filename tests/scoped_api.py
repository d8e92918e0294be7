"""A control API over a real store and an idle training loop, with one token for each scope."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response
from prometheus_client import REGISTRY
from pydantic import BaseModel, ConfigDict

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.config import Settings
from fedvit.errors import ConflictError, NotFoundError
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import ManualClock, seeded_fleet
from fedvit.types import Operation, TrainingProgress, Variant, utc_now
from serve_apps.control.api import Services, create_api

RESTING = TrainingProgress(None, None, "resting", 0, 0, None, None, 0.0, None)
DEVICE = "truck-7"
"""The client that the device token of :class:`ScopedApi` names."""
BODY = {"device_id": DEVICE, "num_examples": 12, "capabilities": {"camera": "front"}}
PROBLEM = "application/problem+json"


class IdleAggregator:
    """A training loop that only counts."""

    def __init__(self) -> None:
        self.starts = 0

    def start_training(self) -> TrainingProgress:
        self.starts += 1
        return RESTING

    def stop_training(self) -> TrainingProgress:
        return RESTING

    def progress(self) -> TrainingProgress:
        return RESTING

    def wait(self, timeout_s: float) -> TrainingProgress:
        return RESTING

    def submit(self, kind: str, params: Mapping[str, Any], call_key: str | None = None) -> Operation:
        raise ConflictError("The loop is idle.")

    def cancel_operation(self, operation_id: str) -> Operation:
        raise NotFoundError("There is no operation.")

    def rollback(self, version: str, *, force: bool = False, reason: str | None = None) -> str:
        raise NotFoundError("There is no version.")

    def switch_variant(self, variant: Variant) -> str:
        raise ConflictError("There is no release.")


class Anything(BaseModel):
    """A body with a field for any JSON."""

    model_config = ConfigDict(extra="forbid")
    value: Any


class ScopedApi:
    """A control API over a real store, with one token for each scope."""

    def __init__(self, home: Path, **access: Any) -> None:
        self.settings: Settings = load_settings(environ={}, overrides={"home": home, "access": access})
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register(seeded_fleet(2))
        self.clock, self.aggregator = ManualClock(), IdleAggregator()
        accountant = PrivacyAccountant(self.store, self.settings)
        services = Services(self.settings, self.store, lambda: self.aggregator, lambda: accountant, clock=self.clock)
        self.api: FastAPI = create_api(services)
        self.client = TestClient(self.api, raise_server_exceptions=False)
        self.tokens = {scope: scoped_token(self.store, scope) for scope in Scope}

    def __enter__(self) -> ScopedApi:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def ask(self, method: str, path: str, scope: str | None = None, **more: Any) -> Response:
        headers = dict(more.pop("headers", {}))
        if scope is not None:
            headers["Authorization"] = f"Bearer {self.tokens[Scope(scope)]}"
        return self.client.request(method, path, headers=headers, **more)

    def refused(self, reason: str) -> float:
        name = "fed_vit_autorl_unauthorized_requests_total"
        return REGISTRY.get_sample_value(name, {"reason": reason}) or 0.0


def scoped_token(store: Store, scope: Scope, client_id: str = DEVICE) -> str:
    """A token with one scope; that of a device names ``client_id``."""
    bound = client_id if scope is Scope.DEVICE else None
    return create_token(store, scope, [scope], now=utc_now(), client_id=bound).text


def filled(path: str) -> str:
    """A path of the OpenAPI document with a client that the device token may act for; other parameters are texts."""
    return path.replace("{client_id}", DEVICE).replace("{", "").replace("}", "")


def operations(api: FastAPI) -> list[tuple[str, str, dict[str, Any]]]:
    results = [
        (verb.upper(), path, facts) for path, verbs in api.openapi()["paths"].items() for verb, facts in verbs.items()
    ]
    assert len(results) > 10
    return results


def takes_json(facts: dict[str, Any]) -> bool:
    return "application/json" in facts.get("requestBody", {}).get("content", {})


IMPLIED = {
    "viewer": {"viewer"},
    "operator": {"viewer", "operator"},
    "admin": {"viewer", "operator", "admin"},
    "emergency": {"viewer", "emergency"},
    "device": {"device"},
    "releases": {"releases"},
    "alerts": {"alerts"},
}
# What is sent there has a format of somebody else's, who may extend it.
FOREIGN_BODIES = {"AlertmanagerMessage"}
