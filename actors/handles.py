"""Typed actor handles: a port's methods as calls of an actor, and an actor class's methods as calls of a port."""

from __future__ import annotations

import hashlib
import inspect
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from fedvit.errors import FedvitError, PlacementError
from fedvit.ports import AccountantPort, AggregatorPort

CALL_TIMEOUT_S = 60.0
PROXIES_TIMEOUT_S = 4.0
_Class = TypeVar("_Class", bound=type)
AGGREGATOR = "fedvit-aggregator"
ACCOUNTANT = "fedvit-accountant"
PING = "ping"
"""The concurrency group of a client proxy's ``ping``, which answers while another thread trains."""


def proxy_name(index: int) -> str:
    """The name of a client proxy, as the Ray dashboard shows it."""
    return f"fedvit-proxy-{index}"


def namespace_of(home: Path) -> str:
    """The Ray namespace of a state folder, so that two systems on one cluster do not share actors."""
    return f"fedvit-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]}"


def fetch(reference: Any, timeout_s: float | None = CALL_TIMEOUT_S) -> Any:
    """``ray.get`` that raises fedvit's own errors as themselves.

    Raises:
        FedvitError: what the actor raised.
        PlacementError: no answer within ``timeout_s``.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        raise PlacementError(
            f"An actor did not answer within {timeout_s:g} s.", cure="See the Ray dashboard and `make logs`."
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, FedvitError):
            raise error.cause from None
        raise
    except RayError as error:
        raise PlacementError(
            f"An actor cannot be reached: {str(error).strip().splitlines()[0]}",
            cure="Ray restarts it; ask again in a moment.",
        ) from None


def find_actor(name: str, namespace: str) -> Any:
    """The actor of that name; raises PlacementError where none runs."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        raise PlacementError(
            f"There is no actor {name}.", cure="Start the system with `make up`, or wait until it has started."
        ) from None


class ActorHandle:
    """The methods of a port, each of which calls the actor's method of that name and fetches the result.

    Ray repeats a call whose actor died while it ran. A parameter ``call_key`` makes the repetition harmless, so it is
    filled with a new key where the caller gives none. A parameter ``timeout_s`` is added to the time limit of the call.

    Args:
        port: the Protocol; cast the handle to it.
        timeouts_s: time limits by method, where they are not :data:`CALL_TIMEOUT_S`.
        not_repeated: methods that Ray shall not repeat.
        new_call_key: makes the keys.
    """

    def __init__(
        self,
        actor: Any,
        port: type,
        *,
        timeouts_s: Mapping[str, float] | None = None,
        not_repeated: Iterable[str] = (),
        new_call_key: Callable[[], str] = secrets.token_hex,
    ) -> None:
        self._timeouts_s, self._new_call_key = timeouts_s or {}, new_call_key
        for name, method in _methods(port).items():
            remote = getattr(actor, name)
            if name in not_repeated:
                remote = remote.options(max_task_retries=0)
            setattr(self, name, partial(self._call, name, remote, inspect.signature(partial(method, None))))

    def _call(self, name: str, remote: Any, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        if "call_key" in signature.parameters and given.arguments.get("call_key") is None:
            given.arguments["call_key"] = self._new_call_key()
        timeout_s = self._timeouts_s.get(name, CALL_TIMEOUT_S) + given.arguments.get("timeout_s", 0.0)
        return fetch(remote.remote(*given.args, **given.kwargs), timeout_s)


def accountant_handle(actor: Any) -> AccountantPort:
    """The actor :class:`actors.privacy_accountant.PrivacyAccountantActor` as a port."""
    return cast(AccountantPort, ActorHandle(actor, AccountantPort))


def aggregator_handle(actor: Any) -> AggregatorPort:
    """The actor :class:`actors.aggregator.Aggregator` as a port."""
    # Ray would report the repetition of a wait on the caller's standard output; the callers of this one repeat it.
    handle = ActorHandle(
        actor, AggregatorPort, timeouts_s={"proxies_alive": PROXIES_TIMEOUT_S}, not_repeated=["await_shutdown"]
    )
    return cast(AggregatorPort, handle)


def connect_accountant(namespace: str) -> AccountantPort:
    """The accountant of the running system; see :func:`find_actor`."""
    return accountant_handle(find_actor(ACCOUNTANT, namespace))


def connect_aggregator(namespace: str) -> AggregatorPort:
    """The aggregator of the running system; see :func:`find_actor`."""
    return aggregator_handle(find_actor(AGGREGATOR, namespace))


def forwards(port: type, target: str) -> Callable[[_Class], _Class]:
    """Class decorator: define each method of ``port`` that the class lacks as a call of ``self.<target>()``."""

    def decorate(cls: _Class) -> _Class:
        for name, method in _methods(port).items():
            if name not in vars(cls):
                setattr(cls, name, _forwarding(name, method, target))
        return cls

    return decorate


def _methods(port: type) -> dict[str, Callable[..., Any]]:
    return {name: method for name, method in vars(port).items() if inspect.isfunction(method) and name[0] != "_"}


def _forwarding(name: str, method: Callable[..., Any], target: str) -> Callable[..., Any]:
    # Ray reads the signature of an actor's methods; `wraps` passes the port's on.
    @wraps(method)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(getattr(self, target)(), name)(*args, **kwargs)

    return forward
