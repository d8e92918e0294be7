"""Simulation of one run in virtual time, with the coordinator and the rules of real runs."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedvit.config import LEAST_NOISE_MULTIPLIER, Settings
from fedvit.ports import AccountantPort
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.randomness import SECRET_BYTES, load_or_create_root_secret
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.steering import change_aggregation_settings
from fedvit.store.store import Store
from fedvit.tools.simulation.delays import Delays, generator
from fedvit.tools.simulation.faults import Faults
from fedvit.tools.simulation.fleet import SimulatedFleet, VirtualClock
from fedvit.tools.simulation.server import NoPrivacy, SimulatedServer
from fedvit.tools.simulation.world import World
from fedvit.types import Evaluation, RunStatus, TrainingProgress

HOUR_S = 3600.0
# How often a round is polled until its deadline; a power of two, so that the last poll is exactly at the deadline.
_POLLS = 16


@dataclass(frozen=True, slots=True)
class Point:
    """A committed version: virtual hours, accepted updates so far, and quality.

    ``accuracy`` and ``loss`` are None if the version was not evaluated.
    """

    hours: float
    round_index: int
    updates: int
    accuracy: float | None
    loss: float | None


@dataclass(frozen=True, slots=True)
class Simulated:
    """The result of a simulation.

    ``outcomes`` counts tasks by outcome: ``accepted``; ``stale`` or ``refused`` on arrival; ``failed`` at the client;
    ``silent``; ``given_up``; ``unused`` in a round that was not committed; ``in_flight`` at the end. ``staleness``
    counts accepted updates by staleness in versions. ``epsilon`` is infinite without privacy.
    """

    name: str
    settings: Settings
    status: RunStatus
    reason: str | None
    points: tuple[Point, ...]
    outcomes: Mapping[str, int]
    staleness: Mapping[int, int]
    epsilon: float

    @property
    def accuracy(self) -> float | None:
        """The accuracy of the last evaluated version."""
        known = [point.accuracy for point in self.points if point.accuracy is not None]
        return known[-1] if known else None

    def hours_to(self, accuracy: float) -> float | None:
        """Virtual hours until the first version with at least this accuracy; None if there is none."""
        return next((p.hours for p in self.points if p.accuracy is not None and p.accuracy >= accuracy), None)


@dataclass(frozen=True, slots=True)
class SimulationObserver:
    """Callbacks: for each committed version, before each client trains, for each evaluation of the global model."""

    version_committed: Callable[[Point], None] = lambda _: None
    training_begins: Callable[[], None] = lambda: None
    evaluated: Callable[[Evaluation], None] = lambda _: None


def simulate(
    settings: Settings,
    world: World,
    name: str = "run",
    observer: SimulationObserver = SimulationObserver(),
    root_secret: bytes | None = None,
) -> Simulated:
    """Simulate the run that the settings describe, in a temporary state folder.

    On one thread, and without privacy, equal arguments give equal points.

    Args:
        settings: the settings of the run; ``home`` is not touched.
        world: the clients and the model.
        name: the name in the report.
        observer: called during the run; an exception that it raises ends the run.
        root_secret: the key of noise, samples and cohorts, needed if the released values shall be private; by default
            it is derived from the seed, which is no secret.

    Raises:
        FedvitError: the run could not begin; see :meth:`fedvit.rounds.coordinator.Coordinator.run`.
    """
    with tempfile.TemporaryDirectory(prefix="fedvit-simulation-") as folder:
        run_settings = _simulated_settings(settings, Path(folder))
        secret = root_secret or generator(run_settings.simulation.seed, "root").bytes(SECRET_BYTES)
        load_or_create_root_secret(run_settings.home, lambda _: secret)
        with Store.open(run_settings.home) as store:
            return _simulated(run_settings, store, world, name, observer)


def _simulated_settings(settings: Settings, home: Path) -> Settings:
    privacy = settings.privacy
    if not settings.simulation.private:
        # No noise is added; the recorded noise multiplier need not be calibrated.
        privacy = privacy.model_copy(update={"noise_multiplier": LEAST_NOISE_MULTIPLIER})
    # No histograms are requested, so no part of the budget is reserved for them.
    histograms = settings.histograms.model_copy(update={"every_rounds": None})
    return settings.model_copy(update={"home": home, "privacy": privacy, "histograms": histograms})


def _simulated(settings: Settings, store: Store, world: World, name: str, observer: SimulationObserver) -> Simulated:
    simulation, clock = settings.simulation, VirtualClock()
    _prepare(store, settings, world)
    faults = Faults(simulation.faults, [client.client_id for client in world.clients], simulation.seed)
    clients = world.training_clients(settings, faults)
    poll_s = (settings.training.round_deadline_s or settings.training.round_timeout_s) / _POLLS
    delays = Delays(simulation.delays, simulation.seed)
    fleet = SimulatedFleet(clients, delays, clock, poll_s=poll_s, on_training=observer.training_begins)
    accountant: AccountantPort = PrivacyAccountant(store, settings) if simulation.private else NoPrivacy(settings)
    loop = Coordinator(
        settings=settings,
        store=store,
        accountant=accountant,
        fleet=fleet,
        model=SimulatedServer(world.server, clock.monotonic, simulation.evaluate_every_s, observer.evaluated),
        on_progress=(recorder := _VersionRecorder(settings, store, clock, observer.version_committed)),
        clock=clock,
        simulated=True,
    )
    recorder.stop = loop.request_stop
    run = loop.run()
    outcomes = _outcomes(recorder.outcomes, fleet)
    epsilon = accountant.budget().epsilon_spent
    return Simulated(
        name, settings, run.status, run.reason, tuple(recorder.points), outcomes, recorder.staleness, epsilon
    )


def _prepare(store: Store, settings: Settings, world: World) -> None:
    simulation, partition = settings.simulation, settings.data.partition
    # The store is temporary, so the data's real digest is not needed.
    store.metadata.bind_fleet(data_digest="simulated", partition=partition.model_dump(mode="json"), classes=())
    store.clients.register(world.clients)
    change_aggregation_settings(
        store,
        lambda now: replace(
            now,
            mode=simulation.mode,
            buffer_size=simulation.buffer_size,
            staleness_tolerance=simulation.staleness_tolerance,
        ),
    )


@dataclass(slots=True)
class _VersionRecorder:
    """Records every committed version, and stops the run at the target accuracy or the time limit."""

    settings: Settings
    store: Store
    clock: VirtualClock
    on_version: Callable[[Point], None]
    stop: Callable[[], None] = lambda: None
    points: list[Point] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    staleness: Counter[int] = field(default_factory=Counter)

    def __call__(self, progress: TrainingProgress) -> None:
        if progress.version is None or progress.rounds_done == len(self.points):
            return
        version = self.store.versions.get(progress.version)
        aggregation, accepted = version.lineage.get("aggregation", {}), version.lineage["clients"]
        self.outcomes["accepted"] += len(accepted)
        for reason in aggregation.get("refused", {}).values():
            self.outcomes["stale" if "versions old" in reason else "refused"] += 1
        self.staleness.update(aggregation.get("staleness", dict.fromkeys(accepted, 0)).values())
        hours, updates = self.clock.monotonic() / HOUR_S, self.outcomes["accepted"]
        accuracy, loss = _finite(version.metrics.get("accuracy")), _finite(version.metrics.get("loss"))
        point = Point(hours, progress.rounds_done, updates, accuracy, loss)
        self.points.append(point)
        self.on_version(point)
        limits = self.settings.simulation
        reached = accuracy is not None and accuracy >= (limits.target_accuracy or math.inf)
        if reached or hours >= (limits.max_hours or math.inf):
            self.stop()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _outcomes(judged: Counter[str], fleet: SimulatedFleet) -> dict[str, int]:
    """The number of tasks by outcome; each task that was sent counts once."""
    arrived = {name: judged[name] for name in ("accepted", "stale", "refused")}
    failed, counts = fleet.counts["failed"], fleet.counts
    left = counts["sent"] - counts["answered"] - counts["silent"] - counts["given_up"]
    unused = counts["answered"] - failed - sum(arrived.values())
    missing = {"failed": failed, "silent": counts["silent"], "given_up": counts["given_up"]}
    return {**arrived, **missing, "unused": unused, "in_flight": left}
