"""Typed handles to the actors: the library's ports, spoken over Ray."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors.client_affinity import ClientAffinity
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
from fedvit.wire.histograms import ClientHistogram, HistogramRequest

CALL_TIMEOUT_S = 60.0
LOOK_S = 1.0
INLINE_BYTES = 50_000
"""Weights up to this size travel with the call: Ray copies arguments below 100 kB, and spares the object store."""

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
    except RayError as error:
        raise PlacementError(
            f"An actor cannot be reached: {str(error).strip().splitlines()[0]}",
            cure="Ray restarts it; ask again in a moment.",
        ) from None


def _find(name: str, namespace: str) -> Any:
    """The actor of that name.

    Raises:
        PlacementError: none runs there.
    """
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        raise PlacementError(
            f"There is no actor {name}.", cure="Start the system with `make up`, or wait until it has started."
        ) from None


class AccountantHandle:
    """Implements :class:`fedvit.ports.AccountantPort`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def connect(cls, namespace: str) -> AccountantHandle:
        """The accountant of the running system.

        Raises:
            PlacementError: none runs there.
        """
        return cls(_find(ACCOUNTANT, namespace))

    def charge(self, charges: Sequence[Charge]) -> None:
        """Write the charges, all or none."""
        fetch(self._actor.charge.remote(list(charges)))

    def check(self, charges: Sequence[Charge]) -> None:
        """Whether the charges could be written now."""
        fetch(self._actor.check.remote(list(charges)))

    def within_budget(self, charges: Sequence[Charge]) -> frozenset[str]:
        """The units that each could bear its own of the charges now."""
        return fetch(self._actor.within_budget.remote(list(charges)))  # type: ignore[no-any-return]

    def reset_budget(
        self, new_epsilon: float, justification: str, requested_by: str, approved_by: str | None
    ) -> BudgetReport:
        """Begin a new budget period."""
        # Ray repeats a call whose actor died in the middle of it; it must not grant twice.
        call_key = secrets.token_hex(16)
        wish = (new_epsilon, justification, requested_by, approved_by, call_key)
        return fetch(self._actor.reset_budget.remote(*wish))  # type: ignore[no-any-return]

    def budget(self, *, outlook: bool = False) -> BudgetReport:
        """What was spent and what is left."""
        return fetch(self._actor.budget.remote(outlook=outlook))  # type: ignore[no-any-return]

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
            PlacementError: none runs there.
        """
        return cls(_find(AGGREGATOR, namespace))

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

    def submit(self, kind: str, params: Mapping[str, Any], call_key: str | None = None) -> Operation:
        """Queue a long operation; an equal ``call_key`` gives the same one."""
        # Ray repeats a call whose actor died in the middle of it.
        key = call_key or secrets.token_hex(16)
        return fetch(self._actor.submit.remote(kind, dict(params), key))  # type: ignore[no-any-return]

    def cancel_operation(self, operation_id: str) -> Operation:
        """End a long operation early."""
        return fetch(self._actor.cancel_operation.remote(operation_id))  # type: ignore[no-any-return]

    def await_shutdown(self, timeout_s: float) -> str | None:
        """Block until this system was told to go down; how, or None after ``timeout_s``."""
        # Not repeated by Ray, which would say so on the caller's standard output: whoever waits asks again himself.
        call = self._actor.await_shutdown.options(max_task_retries=0)
        return fetch(call.remote(timeout_s), timeout_s + CALL_TIMEOUT_S)  # type: ignore[no-any-return]

    def rollback(self, version: str, *, force: bool = False, reason: str | None = None) -> str:
        """Make an older version's content current again."""
        return fetch(self._actor.rollback.remote(version, force, reason))  # type: ignore[no-any-return]

    def switch_variant(self, variant: Variant) -> str:
        """Move the fleet to another variant."""
        return fetch(self._actor.switch_variant.remote(variant))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Handed:
    """What a proxy was handed and has not answered."""

    proxy: int
    task: TrainTask
    client_ids: tuple[str, ...]

    def failed(self, reason: str) -> PartialUpdate:
        outcomes = tuple(ClientOutcome(client_id, 0, reason) for client_id in self.client_ids)
        return PartialUpdate(self.task.round_index, outcomes, {}, 0.0)


class RayFleet:
    """Implements :class:`fedvit.ports.FleetPort` with client proxies: one message a proxy and round.

    A client goes to the proxy that trained it last, where its data is warm, unless another one has less to do. One
    thread may use it at a time.
    """

    def __init__(self, proxies: Sequence[Any], *, timeout_s: float) -> None:
        self._proxies = list(proxies)
        self._timeout_s = timeout_s
        self._homes = ClientAffinity(len(self._proxies))
        self._handed: dict[Any, _Handed] = {}
        self._sketching: list[Any] = []

    @classmethod
    def connect(cls, namespace: str, proxies: int, *, timeout_s: float) -> RayFleet:
        """The ``proxies`` client proxies of the running system.

        Raises:
            PlacementError: they do not run there.
        """
        actors = [_find(proxy_name(index), namespace) for index in range(proxies)]
        return cls(actors, timeout_s=timeout_s)

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[PartialUpdate | None]:
        """Hand the task out and yield the answers as they arrive, those to earlier tasks among them."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        self._hand_out(task, weights, cohort)
        # What the caller has to prepare, it can do while clients train.
        yield None
        heard_s = time.monotonic()
        while self._handed:
            patience_s = heard_s + timeout_s - time.monotonic()
            done, _ = ray.wait(list(self._handed), num_returns=1, timeout=max(0.0, min(LOOK_S, patience_s)))
            if done:
                yield self._answer(done[0])
                heard_s = time.monotonic()
            elif patience_s <= 0:
                return
            else:
                yield None

    def in_flight(self) -> frozenset[str]:
        """The clients that have not answered."""
        return frozenset(client_id for handed in self._handed.values() for client_id in handed.client_ids)

    def give_up(self, reason: str) -> list[PartialUpdate]:
        """Wait for nobody any more; what they answer later is dropped by Ray."""
        given_up = [handed.failed(reason) for handed in self._handed.values()]
        self._handed.clear()
        return given_up

    def proxies_alive(self) -> ProxyReport:
        """Ask every proxy at once; whoever is silent for :data:`PING_TIMEOUT_S` is not there."""
        asked = [proxy.ping.options(concurrency_group=PING, max_task_retries=0).remote() for proxy in self._proxies]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=PING_TIMEOUT_S)
        alive = [reference in answered and _went_well(reference) for reference in asked]
        stranded = self._homes.at([index for index, good in enumerate(alive) if not good])
        return ProxyReport({proxy_name(index): good for index, good in enumerate(alive)}, stranded)

    def request_histograms(self, order: HistogramRequest, client_ids: Sequence[str]) -> None:
        """One call a proxy; it is done before what the proxy is asked after it."""
        for index, own in self._homes.assign(client_ids, Counter()).items():
            self._sketching.append(self._proxies[index].histograms.remote(order, own))

    def histograms(self) -> list[ClientHistogram]:
        """What has arrived; a proxy that died takes its histograms with it."""
        if not self._sketching:
            return []
        done, self._sketching = ray.wait(self._sketching, num_returns=len(self._sketching), timeout=0)
        return [histogram for reference in done if _went_well(reference) for histogram in fetch(reference)]

    def _hand_out(self, task: TrainTask, weights: Weights, cohort: Cohort) -> None:
        handed_weights: Any = dict(weights)
        if sum(array.nbytes for array in weights.values()) > INLINE_BYTES:
            handed_weights = ray.put(handed_weights)
        load = Counter[int]()
        for handed in self._handed.values():
            load[handed.proxy] += len(handed.client_ids)
        for index, client_ids in self._homes.assign(cohort.client_ids, load).items():
            reference = self._proxies[index].train.remote(task, handed_weights, client_ids)
            self._handed[reference] = _Handed(index, task, tuple(client_ids))

    def _answer(self, reference: Any) -> PartialUpdate:
        handed = self._handed.pop(reference)
        try:
            return fetch(reference)  # type: ignore[no-any-return]
        except (RayError, FedvitError) as error:
            return handed.failed(str(error).strip().splitlines()[-1])


def _went_well(reference: Any) -> bool:
    try:
        fetch(reference)
    except (RayError, FedvitError):
        return False
    return True
