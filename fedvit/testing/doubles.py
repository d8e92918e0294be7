"""Test doubles of the ports without torch, Ray or images, also for the tests of users.

The conformance tests run on them, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedvit.aggregation.rule import Rule
from fedvit.clients.secure import SecureClients
from fedvit.errors import NotFoundError
from fedvit.ports import Charge, ExportedModel, LedgerEntry, ModelBenchmark, ProxyReport
from fedvit.privacy.mechanism import clip_update
from fedvit.privacy.randomness import SecretStream
from fedvit.secure_session import SecureAnswer, SecureSession
from fedvit.types import (
    BudgetReport,
    Client,
    ClientKind,
    ClientOutcome,
    Cohort,
    Evaluation,
    FloatArray,
    TrainTask,
    Variant,
    Weights,
    utc_now,
)
from fedvit.updates import ClientAnswer, ClientFailures, ClientUpdate, PartialSum, UpdateBundle, UpdateMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest, HistogramSpec
from fedvit.wire.tensors import encode_weights

if TYPE_CHECKING:
    from fedvit.store.store import Store


class ManualClock:
    """A clock that stands still until :meth:`advance`. Implements :class:`fedvit.ports.ClockPort`."""

    def __init__(self, start: datetime | None = None) -> None:
        self._now = self._start = start or utc_now()

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return (self._now - self._start).total_seconds()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)


class MemoryBlobStore:
    """Blobs in memory, where nothing can damage them. Implements :class:`fedvit.ports.BlobStorePort`."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    def put(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self._contents[digest] = bytes(content)
        return digest

    def put_pieces(self, pieces: Sequence[bytes | memoryview]) -> str:
        return self.put(b"".join(pieces))

    def get(self, digest: str) -> bytes:
        if digest not in self._contents:
            raise NotFoundError(f"There is no blob {digest[:80]!r}.", cure="Store it first.")
        return self._contents[digest]

    def get_range(self, digest: str, start: int, stop: int) -> bytes:
        return self.get(digest)[start:stop]

    def size(self, digest: str) -> int:
        return len(self.get(digest))


class GenerousAccountant:
    """An accountant that writes all charges and refuses none. Implements :class:`fedvit.ports.AccountantPort`.

    It composes no epsilon, which takes time and has tests of its own: reports show fixed values.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._target_epsilon, self._period = 8.0, 1
        self._call_keys: set[str] = set()

    def charge(self, charges: Sequence[Charge]) -> BudgetReport:
        self._store.ledger.append(charges)
        return self.budget()

    def check(self, charges: Sequence[Charge]) -> None:
        pass

    def within_budget(self, charges: Sequence[Charge]) -> frozenset[str]:
        return frozenset(charge.unit_id for charge in charges)

    def reset_budget(
        self,
        new_epsilon: float,
        justification: str,
        requested_by: str,
        approved_by: str | None = None,
        *,
        call_key: str | None = None,
    ) -> BudgetReport:
        if call_key is None or call_key not in self._call_keys:
            self._target_epsilon, self._period = new_epsilon, self._period + 1
            if call_key is not None:
                self._call_keys.add(call_key)
        return self.budget()

    def budget(self, *, outlook: bool = False) -> BudgetReport:
        return BudgetReport("record", self._target_epsilon, 1e-5, 1.0, 1.0, 1.0, 1, 1, period=self._period)

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        return self._store.ledger.entries(since=since, limit=limit)


class PointModel:
    """A model that is a point, and the better the nearer it is to ``target``. Implements ``ServerModelPort``.

    Attributes:
        latency_ms: the p95 in the benchmark of a variant; 1 ms where it is not set.
        relative_accuracy: the share of the accuracy that a variant's export keeps; 1 where it is not set.
        canary_disagrees: variants that predict another class than the others.
        spec: the histogram specification; None where it is not set.
    """

    exports = True
    head: str | None = None

    def __init__(self, target: FloatArray) -> None:
        self._target = target
        self.latency_ms: dict[Variant, float] = {}
        self.relative_accuracy: dict[Variant, float] = {}
        self.canary_disagrees: set[Variant] = set()
        self.spec: HistogramSpec | None = None

    def initial_weights(self) -> Weights:
        return {"point": np.zeros_like(self._target)}

    def frozen_weights(self) -> Weights:
        return {}

    def head_basis(self, weights: Weights, directions: int) -> FloatArray | None:
        return None

    def evaluate(self, weights: Weights) -> Evaluation:
        """Loss is the squared distance; accuracy falls from 1 with it."""
        loss = float(np.sum((weights["point"] - self._target) ** 2))
        return Evaluation(loss, 1 / (1 + loss), {"near": 1 / (1 + loss)}, ((1,),), 1)

    def histogram_spec(self) -> HistogramSpec | None:
        return self.spec

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        content = variant.value.encode() + b":" + weights["point"].tobytes()
        accuracy = self.evaluate(weights).accuracy * self.relative_accuracy.get(variant, 1.0)
        return ExportedModel(content, agreement=1.0, accuracy=accuracy, complexity={"parameters": self._target.size})

    def benchmark(self, content: bytes, limit: int | None = None) -> ModelBenchmark:
        variant = Variant(content.split(b":", 1)[0].decode())
        latency_ms = self.latency_ms.get(variant, 1.0)
        answer = int(variant in self.canary_disagrees)
        return ModelBenchmark((answer,) * (limit or 8), p50_ms=latency_ms / 2, p95_ms=latency_ms)


class FakeFleet:
    """Clients that each move half of the way to ``target``, in ``groups`` messages. Implements ``FleetPort``.

    Clients answer at once, except the held ones. When only held clients are in flight, ``on_silence`` is called; if it
    releases none of them, the time of the round is over.

    Args:
        failing: clients that answer with an error.
        crash_in_round: a round in which ``train`` raises KeyboardInterrupt once, as if the process ended.
        groups: the number of messages of a round, as if from so many proxies.
        rule: the aggregation rule that the messages are for; without it they hold sums weighted by examples.
        root_secret: the clients' identity keys for secure aggregation are derived from it.

    Attributes:
        tamper: by client, a function that changes its update, also within its group's sum.
        secure: their sessions of secure aggregation.
        held: clients that do not answer, nor do the others in their groups; a test adds and removes them.
        histogram_requests: requested histograms, with the clients asked.
        counts_of: the counts of a client's histogram.
    """

    def __init__(
        self,
        target: FloatArray,
        *,
        failing: Collection[str] = (),
        crash_in_round: int | None = None,
        groups: int = 2,
        on_silence: Callable[[], None] = lambda: None,
        rule: Rule | None = None,
        root_secret: bytes = bytes(32),
    ) -> None:
        self._target, self.secure = target, SecureClients(root_secret)
        self.failing = frozenset(failing)
        self.crash_in_round = crash_in_round
        self._groups = groups
        self.on_silence = on_silence
        self.held: set[str] = set()
        self.rule = rule
        self.tamper: dict[str, Callable[[ClientUpdate], ClientAnswer]] = {}
        self._pending: list[UpdateMessage] = []
        self.tasks: list[tuple[TrainTask, Cohort]] = []
        self.timeouts_s: list[float | None] = []
        self.histogram_requests: list[tuple[HistogramRequest, tuple[str, ...]]] = []
        self.counts_of: Callable[[HistogramRequest, str], Sequence[int]] = lambda request, _: (0,) * request.spec.cells
        self._histograms: list[ClientHistogram] = []

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        """One message a group, the group of the first client last."""
        self.tasks.append((task, cohort))
        self.timeouts_s.append(timeout_s)
        assert task.base_digest == hashlib.sha256(encode_weights(weights)).hexdigest(), "weights of another release"
        if task.round_index == self.crash_in_round:
            self.crash_in_round = None
            raise KeyboardInterrupt
        parts = [cohort.client_ids[first :: self._groups] for first in reversed(range(self._groups))]
        self._pending += [self.train_group(task, weights, part) for part in parts if part]
        while self._pending:
            if self._next() is None:
                self.on_silence()
                yield None
            answer = self._next()
            if answer is None:
                return
            self._pending = [other for other in self._pending if other is not answer]
            yield answer

    def in_flight(self) -> frozenset[str]:
        return frozenset(outcome.client_id for answer in self._pending for outcome in answer.outcomes)

    def give_up(self, reason: str) -> list[ClientFailures]:
        failures = [
            ClientFailures.of(message.round_index, (o.client_id for o in message.outcomes), reason)
            for message in self._pending
        ]
        self._pending.clear()
        return failures

    def exchange(
        self, session: SecureSession, phase: str, requests: Mapping[str, bytes], *, timeout_s: float
    ) -> Iterator[SecureAnswer | None]:
        """All answer at once; held clients do not answer."""
        asked = {client_id: request for client_id, request in requests.items() if client_id not in self.held}
        yield from self.secure.exchange(session, phase, asked)

    def end_session(self, session: SecureSession) -> None:
        """The next session ends it."""

    def _next(self) -> UpdateMessage | None:
        free = (a for a in self._pending if self.held.isdisjoint(o.client_id for o in a.outcomes))
        return next(free, None)

    def request_histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> None:
        self.histogram_requests.append((request, tuple(client_ids)))
        place = (request.run_id, request.round_index, 10, request.spec.digest, request.deviation)
        self._histograms += [ClientHistogram(c, *place, tuple(self.counts_of(request, c))) for c in client_ids]

    def histograms(self) -> list[ClientHistogram]:
        histograms, self._histograms = self._histograms, []
        return histograms

    def proxies_alive(self) -> ProxyReport:
        return ProxyReport({"even": True, "odd": True})

    def train_group(self, task: TrainTask, weights: Weights, client_ids: tuple[str, ...]) -> UpdateMessage:
        """The message of one group of clients; a subclass may replace it."""
        step = (self._target - weights["point"]).astype(np.float64) * 0.5
        parts = tuple(self._one(task, client_id, step) for client_id in client_ids)
        if self.rule is not None and self.rule.needs == "single_updates":
            return UpdateBundle(task.round_index, parts)
        outcomes = tuple(outcome for part in parts for outcome in part.outcomes)
        well = [part for part in parts if isinstance(part, ClientUpdate) and part.total_weight]
        sums = {n: sum((p.weighted_sum[n] for p in well), np.zeros(step.shape)) for n in ("point",)}
        total = sum(part.total_weight for part in well)
        return PartialSum(task.round_index, outcomes, sums, total, sum(part.within_clip for part in well))

    def _one(self, task: TrainTask, client_id: str, step: npt.NDArray[np.float64]) -> ClientAnswer:
        if client_id in self.failing:
            return ClientFailures(task.round_index, (ClientOutcome(client_id, 10, "it failed"),))
        outcome = ClientOutcome(client_id, 10)
        if task.privacy_unit == "client":
            clipped, within = clip_update({"point": step}, task.l2_clip_norm)
            own = ClientUpdate(task.round_index, outcome, clipped, 1.0, int(within))
        else:
            weight = 10.0 if self.rule is None or self.rule.weighting == "examples" else 1.0
            own = ClientUpdate(task.round_index, outcome, {"point": weight * step}, weight)
        tamper = self.tamper.get(client_id)
        return own if tamper is None else tamper(own)


def seeded_fleet(count: int, *, seed: int = 0) -> list[Client]:
    """``count`` virtual clients of 10 to 99 examples; equal seeds give equal fleets."""
    sizes = SecretStream(bytes(32), "seeded_fleet", {"seed": seed}).uniform(count)
    return [Client(f"vehicle-{i:04d}", ClientKind.VIRTUAL, 10 + int(90 * size)) for i, size in enumerate(sizes)]
