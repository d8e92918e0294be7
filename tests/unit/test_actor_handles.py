"""Typed actor handles, without Ray: which call is made with which arguments and time limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from actors.handles import CALL_TIMEOUT_S, ActorHandle, aggregator_handle, fetch, forwards
from actors.privacy_accountant import PrivacyAccountantActor
from fedvit.errors import ConflictError, PlacementError
from fedvit.ports import AccountantPort


class Calls(Protocol):
    """A port of the tests."""

    def add(self, a: int, b: int = 1) -> int: ...

    def grant(self, *, call_key: str | None = None) -> str: ...

    def wait(self, timeout_s: float) -> None: ...

    def ask(self) -> None: ...


class Recorder:
    """An actor that answers with the arguments of each call."""

    def __init__(self) -> None:
        self.options_of: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return RecordedMethod(self, name)


class RecordedMethod:
    """A method of such an actor."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def options(self, **options: Any) -> RecordedMethod:
        self._recorder.options_of[self._name] = options
        return self

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self._name, args, kwargs


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float]]:
    """References that were fetched, with the time limit; each is its own result."""
    rows: list[tuple[Any, float]] = []

    def get(reference: Any, timeout: float) -> Any:
        rows.append((reference, timeout))
        return reference

    monkeypatch.setattr(ray, "get", get)
    return rows


def handle(**options: Any) -> Any:
    return ActorHandle(Recorder(), Calls, **options)


def test_a_method_calls_the_actor_with_the_given_arguments(fetched: list[tuple[Any, float]]) -> None:
    assert handle().add(1, b=2) == ("add", (1, 2), {})
    assert handle().add(1) == ("add", (1,), {})
    assert [limit for _, limit in fetched] == [CALL_TIMEOUT_S, CALL_TIMEOUT_S]


def test_a_wrong_argument_fails_before_the_call(fetched: list[tuple[Any, float]]) -> None:
    with pytest.raises(TypeError):
        handle().add(1, c=2)
    assert not fetched


def test_a_call_key_that_is_left_out_is_new_at_every_call(fetched: list[tuple[Any, float]]) -> None:
    keys = iter(["k1", "k2"])
    grants = handle(new_call_key=lambda: next(keys))
    assert [grants.grant()[2], grants.grant(call_key="mine")[2], grants.grant()[2]] == [
        {"call_key": "k1"},
        {"call_key": "mine"},
        {"call_key": "k2"},
    ]


def test_a_time_that_the_actor_waits_is_added_to_the_limit(fetched: list[tuple[Any, float]]) -> None:
    calls = handle(timeouts_s={"ask": 4.0})
    calls.wait(7.0)
    calls.ask()
    assert [limit for _, limit in fetched] == [CALL_TIMEOUT_S + 7.0, 4.0]


def test_ray_does_not_repeat_the_wait_for_the_shutdown(fetched: list[tuple[Any, float]]) -> None:
    recorder = Recorder()
    aggregator_handle(recorder).await_shutdown(1.0)
    assert recorder.options_of == {"await_shutdown": {"max_task_retries": 0}}


def _raising(error: Exception) -> Callable[..., Any]:
    def get(*_: Any, **__: Any) -> Any:
        raise error

    return get


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GetTimeoutError("late"), PlacementError),
        (ray.exceptions.ActorUnavailableError("away", None), PlacementError),
        (RayTaskError("f", "trace", ConflictError("no")), ConflictError),
        (RayTaskError("f", "trace", ValueError("no")), RayTaskError),
    ],
)
def test_errors_of_ray_become_those_of_fedvit(
    error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", _raising(error))
    with pytest.raises(expected):
        fetch("reference")


@forwards(Calls, "_target")
class Forwarder:
    """An actor class of the tests."""

    def ask(self) -> str:
        return "own"

    def _target(self) -> Any:
        class Target:
            def add(self, a: int, b: int = 1) -> int:
                return a + b

        return Target()


def test_an_actor_class_forwards_the_methods_that_it_lacks() -> None:
    actor: Any = Forwarder()
    assert (actor.add(1, b=2), actor.ask()) == (3, "own")


def test_the_accountant_actor_has_every_method_of_its_port() -> None:
    methods = [name for name in vars(AccountantPort) if not name.startswith("_")]
    assert {"charge", "reset_budget"} < set(methods)
    assert all(callable(getattr(PrivacyAccountantActor, name)) for name in methods)
