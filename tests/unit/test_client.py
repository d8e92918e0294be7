"""The typed client over a real control API: values, errors, repetitions, waiting."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from control_client import URL, Recorder, Through
from control_system import WAIT_S, HeldFleet, System
from pydantic import ValidationError

import fedvit.errors
from fedvit.api.problems import error_of
from fedvit.client import FedvitClient
from fedvit.client.caller import PAUSES_S
from fedvit.errors import (
    BudgetExhaustedError,
    ConflictError,
    ControlApiError,
    ControlUnreachableError,
    FedvitError,
    HttpFaultError,
    InvalidRequestError,
    NotFoundError,
    StaleRequestError,
    StateError,
    StateUnavailableError,
    StillRunningError,
    UsageError,
)
from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.testing.doubles import seeded_fleet
from fedvit.types import OperationStatus
from serve_apps.problems import problem_of

Make = Callable[..., System]


def client_of(system: System, **more: Any) -> FedvitClient:
    return FedvitClient(URL, **{"transport": Through(system.http), "sleep": lambda _: None, **more})


def answering(*answers: httpx.Response | httpx.HTTPError) -> tuple[FedvitClient, list[httpx.Request], list[float]]:
    """A client whose server gives these answers in turn; what it asked, and how long it paused."""
    asked: list[httpx.Request] = []
    pauses: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        result = answers[min(len(asked), len(answers)) - 1]
        if isinstance(result, httpx.HTTPError):
            raise result
        return result

    return FedvitClient(URL, transport=httpx.MockTransport(answer), sleep=pauses.append), asked, pauses


# --- values ----------------------------------------------------------------------------------------------------------


def test_answers_are_frozen_values_and_a_change_shows_in_the_next_reading(make: Make) -> None:
    client = client_of(make(max_accuracy_drop=0.5).trained())
    current = client.model.current()
    assert isinstance(current.created_at, datetime)
    with pytest.raises(ValidationError) as frozen:
        current.version = "v9.9.9"  # type: ignore[misc]
    assert frozen.value.errors()[0]["type"] == "frozen_instance"
    release = client.model.rollback("v1.1.2", reason="worse at night")
    assert release.lineage["reason"] == "worse at night"
    assert client.model.current().version == release.version != current.version
    assert json.loads(client.model.release())["signatures"]
    assert "fed_vit_autorl_" in client.system.metrics()
    assert client.system.healthz() == {"status": "ok"}


def test_lists_are_iterated_page_by_page(make: Make) -> None:
    system = make().trained()
    system.store.clients.register(seeded_fleet(12)[5:])
    way = Through(system.http)
    client = client_of(system, transport=way)
    ids = [each.client_id for each in client.clients.iterate(page_size=5)]
    assert ids == [each.client_id for each in system.store.clients.all()]
    assert way.sent == ["GET /api/clients/status"] * 3
    assert [each.version for each in client.model.iterate_versions(page_size=2)] == [
        "v1.1.4",
        "v1.1.3",
        "v1.1.2",
        "v1.1.1",
    ]
    for _ in range(3):
        client.training.stop()
    assert [line.sequence for line in client.audit.iterate(page_size=2)] == [1, 2, 3, 4]
    assert list(client.operations.iterate()) == []


def test_what_a_newer_server_adds_is_ignored_and_what_makes_no_sense_is_said() -> None:
    view = {"min_clients": 1, "wait_timeout": 600, "revision": 3}
    client, *_ = answering(httpx.Response(200, json={**view, "patience": 1}))
    assert client.training.config().etag == '"3"'
    client, *_ = answering(httpx.Response(200, json={**view, "revision": "new"}))
    with pytest.raises(ControlApiError) as error:
        client.training.config()
    assert (error.value.code, error.value.status) == ("control-api", 200)


# --- errors ----------------------------------------------------------------------------------------------------------

ERRORS = [kind for kind in vars(fedvit.errors).values() if isinstance(kind, type) and issubclass(kind, FedvitError)]
# They share the code of their base class, which is what a client sees.
SAME_CODE = {InvalidRequestError: UsageError, StateUnavailableError: StateError}


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind is not FedvitError])
def test_every_error_arrives_as_what_it_was_raised(kind: type[FedvitError]) -> None:
    raised = kind("It is so.", cure="Do otherwise.", retry_after_s=7)
    answer = problem_of(raised)
    result = error_of(answer.status_code, bytes(answer.body).decode())
    assert type(result) is (ControlApiError if issubclass(kind, HttpFaultError) else SAME_CODE.get(kind, kind))
    assert result.message.endswith("It is so.")
    assert (result.cure, result.details["retry_after_s"]) == ("Do otherwise.", 7)


def test_refusals_of_a_real_system_are_errors_with_what_the_log_knows_them_by(make: Make) -> None:
    client = client_of(make(epsilon=epsilon_pld({PoissonGaussian(4.0, 0.5): 2}, 1e-5) + 1e-6).trained())
    with pytest.raises(NotFoundError) as unknown:
        client.model.rollback("v9.9.9")
    assert unknown.value.details["status"] == 404
    assert unknown.value.details["request_id"]
    with pytest.raises(BudgetExhaustedError):
        client.model.retrain("full_retrain")
    with pytest.raises(UsageError) as invalid:
        client.model.optimize("quantization", -1)
    assert invalid.value.exit_status == 2
    assert [fault["field"] for fault in invalid.value.details["errors"]] == ["body.target_latency"]
    with pytest.raises(ControlApiError) as odd:
        client.clients.remove("../../api/operations/x?a=b#c")
    assert odd.value.status == 404


@pytest.mark.parametrize(
    ("answer", "type_", "detail"),
    [
        (httpx.Response(502, text="<h1>Bad gateway</h1>"), "about:blank", "Bad gateway"),
        (httpx.Response(500, json=["no", "object"]), "about:blank", "no"),
        (httpx.Response(503), "about:blank", "Service Unavailable"),
        (httpx.Response(418, json={"type": "/problems/teapot", "detail": "Short."}), "/problems/teapot", "Short."),
        (
            httpx.Response(500, json={"type": "/problems/internal-error", "detail": "Odd.", "self": 1, "message": 2}),
            "/problems/internal-error",
            "Odd.",
        ),
    ],
)
def test_what_has_no_class_is_told_as_it_came(answer: httpx.Response, type_: str, detail: str) -> None:
    client, asked, _ = answering(answer)
    with pytest.raises(ControlApiError) as result:
        client.training.start()
    assert (result.value.status, result.value.type) == (answer.status_code, type_)
    assert detail in result.value.detail
    assert len(asked) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "ftp://localhost"},
        {"base_url": URL, "token": "two words"},
        {"base_url": URL, "token": "line\nbreak"},
        {"base_url": URL, "verify": Path("no-such.pem")},
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FedvitClient(**arguments)


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_would_make_the_path_another_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        FedvitClient(URL, transport=Recorder()).clients.remove(name)


# --- repetitions -----------------------------------------------------------------------------------------------------


def test_a_change_whose_answer_is_lost_is_repeated_and_made_once(make: Make) -> None:
    system = make().trained()
    way = Through(system.http)
    way.lose = 2
    client = client_of(system, transport=way)
    operation = client.model.retrain("full_retrain")
    assert way.sent == ["POST /api/model/retrain"] * 3
    assert len(set(way.keys)) == 1
    assert [each.operation_id for each in system.store.operations.all()] == [operation.operation_id]


def test_each_call_is_another_request_unless_it_is_given_the_same_key(make: Make) -> None:
    fleet = HeldFleet()
    system = make(fleet=fleet)
    way = Through(system.http)
    client = client_of(system, transport=way)
    first = client.training.restart(idempotency_key="once")
    assert client.training.restart(idempotency_key="once").operation_id == first.operation_id
    with pytest.raises(ConflictError):
        client.training.restart("validated_only", idempotency_key="once")
    client.training.stop()
    client.training.stop()
    assert len(set(way.keys)) == 3
    fleet.let.set()


@pytest.mark.parametrize(
    ("call", "attempts"),
    [
        (lambda client: client.training.status(), 4),
        (lambda client: client.training.start(), 4),
        (lambda client: client.clients.heartbeat("truck-7"), 1),
    ],
)
def test_a_line_that_stays_dead_is_given_up_with_a_cure(call: Callable[[FedvitClient], Any], attempts: int) -> None:
    client, asked, pauses = answering(httpx.ConnectError("refused"))
    with pytest.raises(ControlUnreachableError) as dead:
        call(client)
    assert dead.value.cure
    assert len(asked) == attempts
    assert pauses == list(PAUSES_S[: attempts - 1])
    assert dead.value.details.get("idempotency_key") == asked[-1].headers.get("idempotency-key")


def test_a_server_that_thinks_too_long_is_not_asked_twice() -> None:
    client, asked, _ = answering(httpx.ReadTimeout("slow"))
    with pytest.raises(ControlUnreachableError):
        client.training.start()
    assert len(asked) == 1


def test_a_repetition_that_comes_too_early_waits_for_the_first() -> None:
    early = httpx.Response(
        409, json={"type": "/problems/conflict", "detail": "Under way."}, headers={"Retry-After": "1"}
    )
    client, asked, _ = answering(early, early, httpx.Response(204))
    with pytest.raises(ControlApiError) as error:
        client.training.start()
    assert error.value.status == 204
    assert len(asked) == 3
    refused = httpx.Response(409, json={"type": "/problems/conflict", "detail": "No."})
    client, asked, _ = answering(refused)
    with pytest.raises(ConflictError):
        client.training.start()
    assert len(asked) == 1


def test_this_machine_is_not_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": self.headers["Authorization"]}).encode())

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with FedvitClient(f"http://127.0.0.1:{server.server_port}/", "secret") as client:
            assert client.system.healthz() == {"status": "Bearer secret"}
        server.shutdown()


# --- waiting, revisions, holding back --------------------------------------------------------------------------------


def test_an_operation_is_followed_to_its_end(make: Make) -> None:
    system = make().trained()
    pauses: list[float] = []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 3:
            system.local.wait_operation(operation.operation_id, WAIT_S)

    client = client_of(system, sleep=sleep)
    steps: list[str] = []
    operation = client.model.optimize("quantization", 50)
    ended = client.operations.wait(operation, on_progress=lambda step: steps.append(step.status))
    assert ended.status is OperationStatus.SUCCEEDED
    assert ended.result is not None
    assert ended.result["target_met"] is True
    assert steps[-1] == "succeeded"
    assert pauses == sorted(pauses)
    assert client.operations.wait(operation.operation_id) == ended
    assert client.operations.list(OperationStatus.SUCCEEDED) == (ended,)
    assert client.operations.list(OperationStatus.QUEUED, OperationStatus.RUNNING) == ()


def test_waiting_has_an_end_and_an_operation_can_be_cancelled(make: Make) -> None:
    fleet = HeldFleet()
    system = make(fleet=fleet)
    client = client_of(system)
    client.training.start()
    assert fleet.begun.wait(WAIT_S)
    operation = client.training.restart()
    with pytest.raises(StillRunningError) as still:
        client.operations.wait(operation, timeout_s=0)
    assert still.value.details["operation_id"] == operation.operation_id
    assert client.operations.cancel(operation.operation_id).cancel_requested
    system.local.wait_operation(operation.operation_id, WAIT_S)
    assert client.operations.wait(operation).status is OperationStatus.CANCELLED
    fleet.let.set()


def test_a_change_can_be_tied_to_the_revision_that_was_read(make: Make) -> None:
    client = client_of(make())
    read = client.training.config()
    changed = client.training.configure(min_clients=3, if_match=read.etag)
    assert (changed.min_clients, changed.revision) == (3, 1)
    with pytest.raises(StaleRequestError):
        client.training.configure(min_clients=4, if_match=read.etag)
    assert client.training.configure(min_clients=4, if_match=changed.etag).min_clients == 4


def test_whoever_looks_before_a_change_can_stop_it(make: Make) -> None:
    class HeldError(Exception):
        pass

    def hold(_: httpx.Request) -> None:
        raise HeldError

    system = make()
    way = Through(system.http)
    client = client_of(system, transport=way, before_change=hold)
    assert client.training.config().revision == 0
    with pytest.raises(HeldError):
        client.training.configure(min_clients=3)
    assert way.sent == ["GET /api/training/config"]
