"""Typed handles to the actors: the library's ports, spoken over Ray."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from fedvit.errors import FedvitError, PlacementError
from fedvit.ports import Charge, LedgerEntry, ProxyReport
from fedvit.types import (
    BudgetReport,
    ClientOutcome,
    Cohort,
    Operation,
    PartialUpdate,
    TrainingProgress,
    TrainTask,
    Variant,
    Weights,
)

CALL_TIMEOUT_S = 60.0

# A proxy answers in this concurrency group whatever its other thread does.
PING = "ping"
PING_TIMEOUT_S = 2.0

AGGREGATOR = "fedvit-aggregator"
ACCOUNTANT = "fedvit-accountant"


def proxy_name(index: int) -> str:
    """The name of a client proxy, as the Ray dashboard shows it."""
    return f"fedvit-proxy-{index}"


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


class AccountantHandle:
    """Implements :class:`fedvit.ports.AccountantPort`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def connect(cls, namespace: str) -> AccountantHandle:
        """The accountant of the running system.

        Raises:
            ValueError: none runs there.
        """
        return cls(ray.get_actor(ACCOUNTANT, namespace=namespace))

    def charge(self, charges: Sequence[Charge]) -> BudgetReport:
        """Write the charges, all or none."""
        return fetch(self._actor.charge.remote(list(charges)))  # type: ignore[no-any-return]

    def check(self, charges: Sequence[Charge]) -> None:
        """Whether the charges could be written now."""
        fetch(self._actor.check.remote(list(charges)))

    def reset_budget(
        self, new_epsilon: float, justification: str, requested_by: str, approved_by: str | None
    ) -> BudgetReport:
        """Begin a new budget period."""
        # Ray repeats a call whose actor died in the middle of it; it must not grant twice.
        call_key = secrets.token_hex(16)
        wish = (new_epsilon, justification, requested_by, approved_by, call_key)
        return fetch(self._actor.reset_budget.remote(*wish))  # type: ignore[no-any-return]

    def budget(self) -> BudgetReport:
        """What was spent and what is left."""
        return fetch(self._actor.budget.remote())  # type: ignore[no-any-return]

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        """Ledger entries, oldest first."""
        return fetch(self._actor.history.remote(since, limit))  # type: ignore[no-any-return]


class AggregatorHandle:
    """Implements :class:`fedvit.ports.AggregatorPort`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def connect(cls, namespace: str) -> AggregatorHandle:
        """The aggregator of the running system.

        Raises:
            ValueError: none runs there.
        """
        return cls(ray.get_actor(AGGREGATOR, namespace=namespace))

    def start_training(self) -> TrainingProgress:
        """Begin or continue the run."""
        return fetch(self._actor.start_training.remote())  # type: ignore[no-any-return]

    def stop_training(self) -> TrainingProgress:
        """Ask the loop to end after the round under way."""
        return fetch(self._actor.stop_training.remote())  # type: ignore[no-any-return]

    def progress(self) -> TrainingProgress:
        """Where the loop stands."""
        return fetch(self._actor.progress.remote())  # type: ignore[no-any-return]

    def wait(self, timeout_s: float) -> TrainingProgress:
        """Return when the loop rests, or after ``timeout_s``."""
        return fetch(self._actor.wait.remote(timeout_s), timeout_s + CALL_TIMEOUT_S)  # type: ignore[no-any-return]

    def proxies_alive(self) -> ProxyReport:
        """Which client proxies answer now."""
        return fetch(self._actor.proxies_alive.remote(), 2 * PING_TIMEOUT_S)  # type: ignore[no-any-return]

    def submit(self, kind: str, params: Mapping[str, Any]) -> Operation:
        """Queue a long operation."""
        # Ray repeats a call whose actor died in the middle of it. A caller's own repetitions end before they come here.
        call_key = secrets.token_hex(16)
        return fetch(self._actor.submit.remote(kind, dict(params), call_key))  # type: ignore[no-any-return]

    def cancel_operation(self, operation_id: str) -> Operation:
        """End a long operation early."""
        return fetch(self._actor.cancel_operation.remote(operation_id))  # type: ignore[no-any-return]

    def await_shutdown(self, timeout_s: float) -> str | None:
        """Block until this system was told to go down; how, or None after ``timeout_s``."""
        return fetch(self._actor.await_shutdown.remote(timeout_s), timeout_s + CALL_TIMEOUT_S)  # type: ignore[no-any-return]

    def rollback(self, version: str, *, force: bool = False, reason: str | None = None) -> str:
        """Make an older version's content current again."""
        return fetch(self._actor.rollback.remote(version, force, reason))  # type: ignore[no-any-return]

    def switch_variant(self, variant: Variant) -> str:
        """Move the fleet to another variant."""
        return fetch(self._actor.switch_variant.remote(variant))  # type: ignore[no-any-return]


class RayFleet:
    """Implements :class:`fedvit.ports.FleetPort` with client proxies: one message a proxy and round.

    A client stays with the proxy that first trained it, where its features are warm.
    """

    def __init__(self, proxies: Sequence[Any], *, timeout_s: float) -> None:
        self._proxies = list(proxies)
        self._timeout_s = timeout_s
        self._home: dict[str, int] = {}

    @classmethod
    def connect(cls, namespace: str, proxies: int, *, timeout_s: float) -> RayFleet:
        """The ``proxies`` client proxies of the running system.

        Raises:
            ValueError: they do not run there.
        """
        actors = [ray.get_actor(proxy_name(index), namespace=namespace) for index in range(proxies)]
        return cls(actors, timeout_s=timeout_s)

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[PartialUpdate]:
        """Hand the task out and yield the answers as they arrive; a silent proxy's clients are outcomes with errors."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        weights_ref = ray.put(dict(weights))
        pending = {
            self._proxies[index].train.remote(task, weights_ref, ids): ids
            for index, ids in self._assign(cohort.client_ids).items()
        }
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=timeout_s)
            if not done:
                yield from (_failed(task, ids, f"no answer in {timeout_s:g} s") for ids in pending.values())
                return
            yield self._answer(task, done[0], pending.pop(done[0]))

    def proxies_alive(self) -> ProxyReport:
        """Ask every proxy at once; whoever is silent for :data:`PING_TIMEOUT_S` is not there."""
        asked = [proxy.ping.options(concurrency_group=PING, max_task_retries=0).remote() for proxy in self._proxies]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=PING_TIMEOUT_S)
        alive = [reference in answered and _went_well(reference) for reference in asked]
        # Copied at once: a round that is handed out meanwhile adds to it.
        stranded = frozenset(client_id for client_id, index in self._home.copy().items() if not alive[index])
        return ProxyReport({proxy_name(index): good for index, good in enumerate(alive)}, stranded)

    def _answer(self, task: TrainTask, reference: Any, ids: Sequence[str]) -> PartialUpdate:
        try:
            return fetch(reference)  # type: ignore[no-any-return]
        except (RayError, FedvitError) as error:
            return _failed(task, ids, str(error).strip().splitlines()[-1])

    def _assign(self, client_ids: Sequence[str]) -> dict[int, list[str]]:
        groups: dict[int, list[str]] = {}
        for client_id in client_ids:
            index = self._home.setdefault(client_id, len(self._home) % len(self._proxies))
            groups.setdefault(index, []).append(client_id)
        return groups


def _went_well(reference: Any) -> bool:
    try:
        fetch(reference)
    except RayError:
        return False
    return True


def _failed(task: TrainTask, client_ids: Sequence[str], reason: str) -> PartialUpdate:
    outcomes = tuple(ClientOutcome(client_id, 0, reason) for client_id in client_ids)
    return PartialUpdate(task.round_index, outcomes, {}, 0.0)
