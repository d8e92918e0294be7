"""One run in virtual time, through the loop, rules, validation and buffer that also run the real fleet."""

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
from fedvit.privacy.randomness import SECRET_BYTES
from fedvit.privacy.secrets import load_or_create_root_secret
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.steering import change_aggregation_settings
from fedvit.store.store import Store
from fedvit.tools.simulation.delays import Delays, generator
from fedvit.tools.simulation.faults import Faults
from fedvit.tools.simulation.fleet import SimulatedFleet, VirtualClock
from fedvit.tools.simulation.server import NoPrivacy, SimulatedServer
from fedvit.tools.simulation.world import World
from fedvit.types import RunStatus, TrainingProgress

HOUR_S = 3600.0
# So often may a round think again before its deadline; a power of two, so that the last look is at it to the bit.
_LOOKS = 16


@dataclass(frozen=True, slots=True)
class Point:
    """A version: when it was committed, of how many updates it and all before it are made, how good it is.

    ``accuracy`` and ``loss`` are None where nobody looked.
    """

    hours: float
    round_index: int
    updates: int
    accuracy: float | None
    loss: float | None


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a simulation came to.

    ``outcomes`` counts tasks by what became of them: ``accepted``; ``stale`` or ``refused`` when they arrived;
    ``failed`` at the client; ``silent``; ``given_up``; ``unused``, of a round that was not committed; ``in_flight``.
    ``staleness`` counts accepted updates by how many versions late they were. ``epsilon`` is infinite where nothing was
    private.
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
        """Of the last version that was evaluated."""
        known = [point.accuracy for point in self.points if point.accuracy is not None]
        return known[-1] if known else None

    def hours_to(self, accuracy: float) -> float | None:
        """Virtual hours to the first version that was seen to be so good; None where none was."""
        return next((p.hours for p in self.points if p.accuracy is not None and p.accuracy >= accuracy), None)


def simulate(
    settings: Settings,
    world: World,
    name: str = "run",
    on_version: Callable[[Point], None] = lambda _: None,
    root_secret: bytes | None = None,
) -> Simulated:
    """Run what ``settings`` describe, in a state folder of its own that is gone afterwards.

    On one thread, and without privacy, equal arguments give equal points.

    Args:
        settings: of a run; ``simulation`` says what is not real about it, ``home`` is not touched.
        world: who learns what.
        name: what the report calls it.
        on_version: told every version; what it raises ends the run.
        root_secret: the key of noise, samples and cohorts, where what is released shall be private; by default it
            follows from the seed, which is no secret.

    Raises:
        FedvitError: the run could not begin; see :meth:`fedvit.rounds.coordinator.Coordinator.run`.
    """
    with tempfile.TemporaryDirectory(prefix="fedvit-simulation-") as folder:
        own = _own_settings(settings, Path(folder))
        drawn = root_secret or generator(own.simulation.seed, "root").bytes(SECRET_BYTES)
        load_or_create_root_secret(own.home, lambda _: drawn)
        with Store.open(own.home) as store:
            return _simulated(own, store, world, name, on_version)


def _own_settings(settings: Settings, home: Path) -> Settings:
    privacy = settings.privacy
    if not settings.simulation.private:
        # Nobody draws any noise; what a run has to be recorded with need not be calibrated.
        privacy = privacy.model_copy(update={"noise_multiplier": LEAST_NOISE_MULTIPLIER})
    # Nothing is sketched, so nothing of the budget is kept back for it.
    histograms = settings.histograms.model_copy(update={"every_rounds": None})
    return settings.model_copy(update={"home": home, "privacy": privacy, "histograms": histograms})


def _simulated(
    settings: Settings,
    store: Store,
    world: World,
    name: str,
    on_version: Callable[[Point], None],
) -> Simulated:
    simulation, clock = settings.simulation, VirtualClock()
    _prepare(store, settings, world)
    faults = Faults(simulation.faults, [client.client_id for client in world.clients], simulation.seed)
    learners = world.learners(settings, faults)
    look_s = (settings.training.round_deadline_s or settings.training.round_timeout_s) / _LOOKS
    fleet = SimulatedFleet(learners, Delays(simulation.delays, simulation.seed), clock, look_s=look_s)
    accountant: AccountantPort = PrivacyAccountant(store, settings) if simulation.private else NoPrivacy(settings)
    loop = Coordinator(
        settings=settings,
        store=store,
        accountant=accountant,
        fleet=fleet,
        model=SimulatedServer(world.server, clock.monotonic, simulation.evaluate_every_s),
        on_progress=(watch := _Watch(settings, store, clock, on_version)),
        clock=clock,
    )
    watch.stop = loop.request_stop
    run = loop.run()
    outcomes = _outcomes(watch.outcomes, fleet)
    epsilon = accountant.budget().epsilon_spent
    return Simulated(name, settings, run.status, run.reason, tuple(watch.points), outcomes, watch.staleness, epsilon)


def _prepare(store: Store, settings: Settings, world: World) -> None:
    simulation, partition = settings.simulation, settings.data.partition
    # Nothing is kept beyond this run, so there is nothing that other data could be mistaken for.
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
class _Watch:
    """Looks at every version as it is committed, and asks for the end when enough is seen."""

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
        told, accepted = version.lineage.get("aggregation", {}), version.lineage["clients"]
        self.outcomes["accepted"] += len(accepted)
        for reason in told.get("refused", {}).values():
            self.outcomes["stale" if "versions old" in reason else "refused"] += 1
        self.staleness.update(told.get("staleness", dict.fromkeys(accepted, 0)).values())
        self._add(progress.rounds_done, version.metrics)

    def _add(self, round_index: int, metrics: Mapping[str, float]) -> None:
        hours, updates = self.clock.monotonic() / HOUR_S, self.outcomes["accepted"]
        point = Point(hours, round_index, updates, _known(metrics.get("accuracy")), _known(metrics.get("loss")))
        self.points.append(point)
        self.on_version(point)
        wanted = self.settings.simulation
        good = point.accuracy is not None and point.accuracy >= (wanted.target_accuracy or math.inf)
        if good or hours >= (wanted.max_hours or math.inf):
            self.stop()


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _outcomes(seen: Counter[str], fleet: SimulatedFleet) -> dict[str, int]:
    """Every task that was handed out, once."""
    arrived = {name: seen[name] for name in ("accepted", "stale", "refused")}
    failed, counts = fleet.counts["failed"], fleet.counts
    left = counts["handed"] - counts["answered"] - counts["silent"] - counts["given_up"]
    unused = counts["answered"] - failed - sum(arrived.values())
    gone = {"failed": failed, "silent": counts["silent"], "given_up": counts["given_up"]}
    return {**arrived, **gone, "unused": unused, "in_flight": left}
