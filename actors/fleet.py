"""The fleet on Ray: client proxies behind the fleet port, and the assignment of clients to proxies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.handles import PING, fetch, find_actor, proxy_name
from actors.proxy_calls import ProxyCall, ProxyCalls
from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import FedvitError
from fedvit.ports import ClockPort, ProxyReport
from fedvit.secure_session import ADVERTISE, SecureAnswer, SecureSession
from fedvit.types import Cohort, TrainTask, Weights
from fedvit.updates import ClientFailures, UpdateMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest
from fedvit.wire.untrusted import one_line

REMEMBERED = 100_000
WAIT_S = 1.0
INLINE_BYTES = 50_000
"""Weights up to this size travel with the call: Ray copies arguments below 100 kB, and spares the object store."""
PING_TIMEOUT_S = 2.0


class ClientAffinity:
    """Remembers which proxy trained each of the last :data:`REMEMBERED` clients.

    The assignment affects only speed: a client's update is the same on every proxy.
    """

    def __init__(self, proxies: int, remembered: int = REMEMBERED) -> None:
        self._proxies, self._remembered = proxies, remembered
        self._proxy_of: dict[str, int] = {}

    def assign(self, client_ids: Sequence[str], load: Mapping[int, int]) -> dict[int, list[str]]:
        """The clients for each proxy; it is assigned fewer by the ``load`` of clients that it is still training."""
        share = -(-(len(client_ids) + sum(load.values())) // self._proxies)
        room = {index: share - load.get(index, 0) for index in range(self._proxies)}
        groups: dict[int, list[str]] = {index: [] for index in room}
        unassigned = []
        for client_id in client_ids:
            last = self._proxy_of.get(client_id)
            if last is None or len(groups[last]) >= room[last]:
                unassigned.append(client_id)
            else:
                groups[last].append(client_id)
        for client_id in unassigned:
            index = max(room, key=lambda index: room[index] - len(groups[index]))
            groups[index].append(client_id)
            self._proxy_of[client_id] = index
        for client_id in list(self._proxy_of)[: -max(self._remembered, len(client_ids))]:
            del self._proxy_of[client_id]
        return {index: group for index, group in groups.items() if group}

    def at(self, proxies: Sequence[int]) -> frozenset[str]:
        """The clients that were last trained on these proxies."""
        # A copy: another thread may assign clients meanwhile.
        return frozenset(client_id for client_id, index in self._proxy_of.copy().items() if index in proxies)


class RayFleet:
    """Implements :class:`fedvit.ports.FleetPort` with client proxies: one message a proxy and round.

    A client goes to the proxy that trained it last, where its data is warm, unless another one has less to do. A client
    that ends the process of its proxy is searched for; see :class:`actors.proxy_calls.ProxyCalls`. The others of its
    proxy then answer in several messages. One thread may use it at a time.
    """

    def __init__(self, proxies: Sequence[Any], *, timeout_s: float, clock: ClockPort = SYSTEM_CLOCK) -> None:
        self._proxies = list(proxies)
        self._timeout_s, self._clock = timeout_s, clock
        self._affinity = ClientAffinity(len(self._proxies))
        self._calls = ProxyCalls(self._start)
        self._histogram_calls: list[Any] = []
        # The proxy that has the keys of a client in the present session.
        self._keys_at: dict[str, int] = {}

    @classmethod
    def connect(cls, namespace: str, proxies: int, *, timeout_s: float) -> RayFleet:
        """The ``proxies`` client proxies of the running system; see :func:`actors.handles.find_actor`."""
        return cls([find_actor(proxy_name(index), namespace) for index in range(proxies)], timeout_s=timeout_s)

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        self._call_proxies(task, weights, cohort)
        # The caller can prepare what it needs while clients train.
        yield None
        answered_at_s = self._clock.monotonic()
        while self._calls.running:
            left_s = answered_at_s + timeout_s - self._clock.monotonic()
            ready, _ = ray.wait(list(self._calls.running), num_returns=1, timeout=max(0.0, min(WAIT_S, left_s)))
            if ready:
                yield self._answer(ready[0])
                answered_at_s = self._clock.monotonic()
            elif left_s <= 0:
                return
            else:
                yield None

    def in_flight(self) -> frozenset[str]:
        return frozenset(client_id for call in self._calls.all() for client_id in call.client_ids)

    def give_up(self, reason: str) -> list[ClientFailures]:
        return [call.failed(reason) for call in self._calls.clear()]

    def exchange(
        self, session: SecureSession, phase: str, requests: Mapping[str, bytes], *, timeout_s: float
    ) -> Iterator[SecureAnswer | None]:
        """One call a proxy and phase. A client whose proxy ended is out of the session: its keys are lost."""
        if phase == ADVERTISE:
            groups = self._affinity.assign(sorted(requests), Counter())
            self._keys_at = {client_id: index for index, group in groups.items() for client_id in group}
        groups = self._at_their_keys(requests)
        calls = {
            # Not repeated by Ray: the process that is started anew has no keys.
            self._proxies[index]
            .exchange.options(max_task_retries=0)
            .remote(session, phase, {c: requests[c] for c in group}): group
            for index, group in groups.items()
        }
        ends_s = self._clock.monotonic() + timeout_s
        while calls:
            left_s = ends_s - self._clock.monotonic()
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=max(0.0, min(WAIT_S, left_s)))
            if ready:
                yield from _answers_of(ready[0], calls.pop(ready[0]))
            elif left_s <= 0:
                return
            else:
                yield None

    def end_session(self, session: SecureSession) -> None:
        """Proxies drop the keys when the next session begins."""
        self._keys_at = {}

    def proxies_alive(self) -> ProxyReport:
        """Ask every proxy at once; one that is silent for :data:`PING_TIMEOUT_S` counts as dead."""
        pings = [proxy.ping.options(concurrency_group=PING, max_task_retries=0).remote() for proxy in self._proxies]
        answered, _ = ray.wait(pings, num_returns=len(pings), timeout=PING_TIMEOUT_S)
        alive = [ping in answered and _succeeded(ping) for ping in pings]
        stranded = self._affinity.at([index for index, good in enumerate(alive) if not good])
        return ProxyReport({proxy_name(index): good for index, good in enumerate(alive)}, stranded)

    def request_histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> None:
        """One call a proxy; it ends before calls that are made after it."""
        for index, group in self._affinity.assign(client_ids, Counter()).items():
            # Not repeated by Ray: one that ends the process would end the training calls after it, too.
            call = self._proxies[index].histograms.options(max_task_retries=0)
            self._histogram_calls.append(call.remote(request, group))

    def histograms(self) -> list[ClientHistogram]:
        """Those of a proxy that died are lost."""
        calls = self._histogram_calls
        if not calls:
            return []
        ready, self._histogram_calls = ray.wait(calls, num_returns=len(calls), timeout=0)
        return [histogram for call in ready if _succeeded(call) for histogram in fetch(call)]

    def _call_proxies(self, task: TrainTask, weights: Weights, cohort: Cohort) -> None:
        argument: Any = dict(weights)
        if sum(array.nbytes for array in weights.values()) > INLINE_BYTES:
            argument = ray.put(argument)
        load = Counter[int]()
        for call in self._calls.all():
            load[call.proxy] += len(call.client_ids)
        known, secure = cohort.num_examples, cohort.secure
        groups = (
            self._affinity.assign(cohort.client_ids, load) if secure is None else self._at_their_keys(cohort.client_ids)
        )
        for index, client_ids in groups.items():
            sizes = None if known is None else {c: known[c] for c in client_ids if c in known}
            masks = None if secure is None else {c: secure[c] for c in client_ids}
            self._calls.add(ProxyCall(index, task, argument, tuple(client_ids), cohort.max_weight, sizes, masks))

    def _at_their_keys(self, client_ids: Iterable[str]) -> dict[int, list[str]]:
        """These clients by the proxy that has their keys; one that was never asked for keys goes to the first."""
        groups = defaultdict[int, list[str]](list)
        for client_id in sorted(client_ids):
            groups[self._keys_at.get(client_id, 0)].append(client_id)
        return groups

    def _start(self, call: ProxyCall) -> Any:
        # Not repeated by Ray, which would not find out which client ends the process.
        train = self._proxies[call.proxy].train.options(max_task_retries=0)
        limits = call.max_weight, call.num_examples, call.secure_of_its_clients
        return train.remote(call.task, call.weights, list(call.client_ids), *limits)

    def _answer(self, reference: Any) -> UpdateMessage | None:
        try:
            answer: UpdateMessage = ray.get(reference)
        except RayActorError as error:
            return self._calls.crashed(reference, _detail(error))
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, FedvitError) else error
            return self._calls.answered(reference).failed(str(cause).strip().splitlines()[-1])
        except RayError as error:
            return self._calls.answered(reference).failed(str(error).strip().splitlines()[-1])
        self._calls.answered(reference)
        return answer


def _answers_of(reference: Any, client_ids: Sequence[str]) -> list[SecureAnswer]:
    """The answers of one proxy; where its call failed, that is the error of each of its clients."""
    try:
        answers: list[SecureAnswer] = fetch(reference)
    except (RayError, FedvitError) as error:
        reason = one_line(str(error).strip().splitlines()[0])
        return [SecureAnswer(client_id, error=reason) for client_id in client_ids]
    return answers


def _detail(error: RayActorError) -> str:
    """What Ray says of the end of a process, in one line."""
    text = one_line(" ".join(str(error).split()).rpartition("Worker exit type:")[2].strip())
    return text or type(error).__name__


def _succeeded(reference: Any) -> bool:
    try:
        fetch(reference)
    except (RayError, FedvitError):
        return False
    return True
