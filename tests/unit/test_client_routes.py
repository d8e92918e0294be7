"""The client against the OpenAPI document: the same routes, the same parameters, the same models."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, get_args, get_type_hints

import httpx
import pytest
from control_client import Recorder, SentError, route_of

from fedvit.api.base import View
from fedvit.client import FedvitClient
from fedvit.client.caller import Group
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.types import OperationStatus, Variant
from serve_apps.control.api import Services, create_api

# Convenience over other methods, not routes.
HELPERS = {"iterate", "iterate_versions", "wait"}
ARGUMENTS: dict[str, Any] = {
    "after": 7,
    "affected_clients": ["truck-7"],
    "breach_type": "data_exposure",
    "buffer_size": 4,
    "capabilities": {"camera": "front"},
    "client_id": "truck-7",
    "client_selection": "validated_only",
    "counts": [3, -1],
    "description": "A disk was stolen.",
    "device_id": "truck-7",
    "digest": "ab" * 32,
    "force": True,
    "hours": 12,
    "idempotency_key": "once",
    "if_match": '"3"',
    "immediate_actions": ["stop_training"],
    "incident_id": "PB-1",
    "incident_status": "open",
    "justification": "The board has agreed to it.",
    "kind": "silo",
    "limit": 5,
    "max_bytes": 1000,
    "message": {"version": "4", "truncatedAlerts": 0, "alerts": []},
    "min_clients": 3,
    "mode": "graceful",
    "model_version": "v1.2.3",
    "new_epsilon": 1.0,
    "num_examples": 12,
    "offset": 2,
    "operation_id": "op-1",
    "phase": "advertise",
    "reason": "worse at night",
    "request_id": "r-1",
    "round_index": 4,
    "run_id": "run-0001",
    "save_state": True,
    "section": "root_cause",
    "session": "ab" * 32,
    "staleness_tolerance": 5,
    "status": "ok",
    "statuses": OperationStatus.QUEUED,
    "strategy": "quantization",
    "target_latency": 50,
    "text": "A cable was cut.",
    "update": b"safetensors",
    "validated": False,
    "variant": Variant.STANDARD,
    "version": "v1.2.3",
    "wait_timeout": 300,
}


@dataclass(frozen=True)
class Call:
    """One method of the client, and what it sends."""

    name: str
    method: Callable[..., Any]
    request: httpx.Request

    @property
    def returns(self) -> Any:
        return get_type_hints(self.method)["return"]


def _arguments(method: Callable[..., Any]) -> tuple[list[Any], dict[str, Any]]:
    positional, named = [], {}
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.append(ARGUMENTS[parameter.name])
        else:
            named[parameter.name] = ARGUMENTS[parameter.name]
    return positional, named


def _calls() -> Iterator[Call]:
    client = FedvitClient("http://testserver", transport=Recorder())
    groups = {name: group for name, group in vars(client).items() if isinstance(group, Group)}
    for group_name, group in groups.items():
        for name, method in inspect.getmembers(group, inspect.ismethod):
            if name.startswith("_") or name in HELPERS:
                continue
            positional, named = _arguments(method)
            with pytest.raises(SentError) as sent:
                method(*positional, **named)
            yield Call(f"{group_name}.{name}", method, sent.value.request)


CALLS = list(_calls())


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The server's OpenAPI document."""
    home = tmp_path_factory.mktemp("home")

    def nobody() -> NoReturn:
        raise AssertionError("the document needs no actor")

    with Store.open(home) as store:
        settings = load_settings(environ={}, overrides={"home": home})
        return create_api(Services(settings, store, aggregator=nobody, accountant=nobody)).openapi()


def served_routes(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {
        f"{verb.upper()} {path}": facts for path, verbs in document["paths"].items() for verb, facts in verbs.items()
    }


def test_every_route_has_exactly_one_method(document: Mapping[str, Any]) -> None:
    served = set(served_routes(document))
    methods = [route_of(call.request, served) for call in CALLS]
    assert sorted(methods) == sorted(served)


def test_methods_send_every_parameter_that_their_route_takes_and_no_other(document: Mapping[str, Any]) -> None:
    routes = served_routes(document)
    for call in CALLS:
        facts = routes[route_of(call.request, routes)]
        assert set(call.request.url.params) == _parameters(facts, "query"), call.name
        sent = {name for name in ("if-match",) if name in call.request.headers}
        # A key goes with every change, documented or not.
        documented = {name.lower() for name in _parameters(facts, "header")} - {"idempotency-key"}
        assert sent == documented, call.name
        if _takes_bytes(facts):
            assert call.request.content == ARGUMENTS["update"]
            assert call.request.headers["content-type"] == "application/octet-stream"
            continue
        body = json.loads(call.request.content) if call.request.content else {}
        assert set(body) == _body_fields(facts, document), call.name


def test_methods_return_the_models_that_their_route_answers(document: Mapping[str, Any]) -> None:
    routes = served_routes(document)
    for call in CALLS:
        answers = {_model_of(schema) for schema in _answers(routes[route_of(call.request, routes)])}
        assert _models_in(call.returns) == answers - {None}, call.name


def _parameters(facts: Mapping[str, Any], place: str) -> set[str]:
    return {parameter["name"] for parameter in facts.get("parameters", ()) if parameter["in"] == place}


def _takes_bytes(facts: Mapping[str, Any]) -> bool:
    return "application/octet-stream" in facts.get("requestBody", {}).get("content", {})


def _body_fields(facts: Mapping[str, Any], document: Mapping[str, Any]) -> set[str]:
    if "requestBody" not in facts:
        return set()
    schema = _resolved(facts["requestBody"]["content"]["application/json"]["schema"], document)
    return set(schema["properties"])


def _answers(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    good = [answer for status, answer in facts["responses"].items() if status.startswith("2")]
    return [
        answer["content"]["application/json"]["schema"]
        for answer in good
        if "application/json" in answer.get("content", {})
    ]


def _model_of(schema: Mapping[str, Any]) -> str | None:
    """The model of a schema, or of its items; None where it is no model."""
    reference = schema.get("items", schema).get("$ref")
    return reference.rsplit("/", 1)[-1] if reference else None


def _models_in(annotation: Any) -> set[str]:
    """The models of a return type: itself, those of a union, or that of a tuple's items."""
    if isinstance(annotation, type) and issubclass(annotation, View):
        return {annotation.__name__}
    return {name for part in get_args(annotation) for name in _models_in(part)}


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    return root["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]] if "$ref" in schema else schema
