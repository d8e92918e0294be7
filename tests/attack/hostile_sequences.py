"""Random sequences of tasks from a hostile server to a vehicle, as a state machine of Hypothesis.

The vehicle, its policy, its ledger, its client host and its DP-SGD are the real ones. The model is a linear layer on
three means, so that thousands of sequences take minutes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hostile_server import CLASSES, CLIENT, SPEC, HostileServer, Offered, error_of, settings_with
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn

from edge_runtime.training.policy import VehiclePolicy
from edge_runtime.training.vehicle import Vehicle
from fedvit.clients.local import LocalTrainer
from fedvit.config import ModelConfig
from fedvit.errors import FedvitError
from fedvit.models.layers import HeadBody
from fedvit.models.vision import VisionModel
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Event, Gaussian, PoissonGaussian
from fedvit.privacy.randomness import SecretStream
from fedvit.privacy.round_cost import spend_of
from fedvit.store.store import Store
from fedvit.testing.doubles import ManualClock
from fedvit.types import TrainTask

DELTA = 1e-5
POLICY = VehiclePolicy(max_epsilon=12.0, max_epsilon_per_day=6.0, min_noise_multiplier=0.5, target_delta=DELTA)
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


class Means(nn.Module):
    """Frozen features [B, 4] of uint8 images [B, S, S, 3]: random projections of their means."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        self.projection = nn.Parameter(weights, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = (images.float().mean(dim=(1, 2)) / 255.0) @ self.projection
        return features


def tiny_model(config: ModelConfig, num_classes: int, image_size: int) -> VisionModel:
    """A model that differs where the configured one would."""
    return _tiny_model(config.seed, config.hybrid.depth, num_classes, image_size)


@cache
def _tiny_model(seed: int, depth: int, num_classes: int, image_size: int) -> VisionModel:
    head = nn.Linear(4, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return VisionModel(Means(1000 * depth + seed), HeadBody(head), image_size, num_classes)


@cache
def tiny_trainer(model: VisionModel, *, physical_batch_size: int) -> LocalTrainer:
    """One trainer a model; every call of ``train`` begins with the weights that it is given."""
    return LocalTrainer(model, physical_batch_size=physical_batch_size)


VARIANTS = [
    settings_with(),
    settings_with(model={"seed": 1}),
    settings_with(model={"hybrid": {"depth": 2, "width": 16, "heads": 2}}),
    settings_with(data={"image_size": 24}),
    settings_with(training={"local_steps": 2}),
    settings_with(privacy={"l2_clip_norm": 0.5}),
    settings_with(training={"aggregation": "fedprox", "aggregation_options": {"proximal_mu": 0.5}}),
    settings_with(training={"aggregation": "scaffold"}),
    settings_with(training={"aggregation": "ditto"}),
    settings_with(training={"compression": {"encodings": ["top_k"], "top_k_fraction": 0.5}}),
    settings_with(model={"name": "vit_tiny_patch16_224"}),
]
LIES: list[dict[str, Any]] = [
    *[{}] * 8,
    {"num_examples": 9},
    {"image_size": 24},
    {"classes": list(CLASSES[::-1])},
    {"output_id": "0" * 64},
    {"context_digest": "0" * 64},
    {"frozen_digest": "0" * 64},
    {"noise_multiplier": 50.0},
    {"round_index": 3},
    {"run_id": "../run-0001"},
    {"settings": VARIANTS[1].training_identity()},
]
SPECS = [
    SPEC,
    type(SPEC)(SPEC.edges, len(CLASSES), (4, -4)),
    type(SPEC)({"brightness": (100.0,)}, len(CLASSES)),
]
GARBAGE = [b"", b"{}", b"[" * 10_000, b'{"client_id": "truck-7", "poll_after_s": NaN, "task": null, "histogram": null}']


Request = dict[str, Any]
PLACE = {"run_id": st.sampled_from(["run-0001", "run-0002"]), "round_index": st.integers(1, 3)}
TASKS: st.SearchStrategy[Request] = st.fixed_dictionaries(
    {
        "variant": st.sampled_from(range(len(VARIANTS))),
        **PLACE,
        "task": st.sampled_from([{}, {}, {"noise_multiplier": 1.0}, {"noise_multiplier": 0.1}]),
        "encoding": st.sampled_from(["float32", "float32", "int8", "top_k"]),
        "shift": st.sampled_from([0.0, 0.0, 0.5]),
        "lie": st.sampled_from(range(len(LIES))),
    }
)
HISTOGRAMS: st.SearchStrategy[Request] = st.fixed_dictionaries(
    {
        "variant": st.sampled_from([0, 0, 1, 3]),
        **PLACE,
        "noise_multiplier": st.sampled_from([5.25, 5.25, 2.0, 0.1]),
        "spec": st.sampled_from(range(len(SPECS))),
    }
)


@dataclass(slots=True)
class Figures:
    """What all sequences together showed."""

    sequences: int = 0
    tasks: int = 0
    outputs: int = 0
    refusals: int = 0
    largest_share: float = 0.0
    """Of the epsilon on the ledger, the largest share that the server's view implies."""


@dataclass(slots=True)
class Draws:
    """Secret streams and noise that were drawn since the last upload."""

    seen: list[bytes] = field(default_factory=list)

    def record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Record every stream and every draw of noise of this process from now on."""
        create, normal = SecretStream.__init__, SecretStream.normal

        def created(stream: SecretStream, secret: bytes, purpose: str, context: dict[str, Any]) -> None:
            create(stream, secret, purpose, context)
            self.seen.append(repr((secret, purpose, sorted(context.items()))).encode())

        def drawn(stream: SecretStream, count: int, *more: Any, **named: Any) -> Any:
            noise = normal(stream, count, *more, **named)
            self.seen.append(noise.tobytes())
            return noise

        monkeypatch.setattr(SecretStream, "__init__", created)
        monkeypatch.setattr(SecretStream, "normal", drawn)


DRAWS = Draws()


class Watched(HostileServer):
    """Knows which noise and which coins each output was made of, and what each output must have cost."""

    def __init__(self) -> None:
        super().__init__(build=tiny_model)
        self.made_of: dict[bytes, bytes] = {}
        self.view: dict[bytes, tuple[Event, int]] = {}

    def got_update(self, path: str, content: bytes) -> None:
        if error_of(content) is None:
            assert self.task is not None
            assert isinstance(self.task.request, TrainTask)
            task = self.task.request
            event = PoissonGaussian(task.noise_multiplier, task.sampling_prob)
            self._got(content, (event, task.local_steps))
        else:
            HostileSequence.figures.refusals += 1
        DRAWS.seen.clear()

    def got_histogram(self, path: str, counts: tuple[int, ...]) -> None:
        assert self.histogram is not None
        assert not isinstance(self.histogram.request, TrainTask)
        self._got(repr(counts).encode(), (Gaussian(self.histogram.request.noise_multiplier), 1))
        DRAWS.seen.clear()

    def _got(self, content: bytes, cost: tuple[Event, int]) -> None:
        for drawn in DRAWS.seen:
            assert self.made_of.setdefault(drawn, content) == content, "one noise for two outputs"
        self.view.setdefault(content, cost)


class HostileSequence(RuleBasedStateMachine):
    """A server that may send anything in any order, and owners who change images, restart and wait."""

    figures: ClassVar[Figures] = Figures()
    disks: ClassVar[list[Path]] = []
    """Images of a vehicle: eight, eight others, and ten."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fedvit-attack-", dir=MEMORY))
        self.server, self.clock, self.offers = Watched(), ManualClock(), list[Offered]()
        self.vehicles, self.checked = [self._vehicle(0)], 0
        self.reader = Store.open(self.folder / "home")

    def teardown(self) -> None:
        """Compare what the server's view implies with the ledger, over the whole sequence."""
        view, ledger = (self._epsilon(spends) for spends in (self.server.view.values(), self._ledger()))
        names = [path.name for path in self.folder.iterdir()]
        for vehicle in self.vehicles:
            vehicle.close()
        self.reader.close()
        shutil.rmtree(self.folder)
        assert names == ["home"]
        assert view <= ledger <= POLICY.max_epsilon
        self.figures.sequences += 1
        self.figures.outputs += len(self.server.view)
        self.figures.largest_share = max(self.figures.largest_share, view / ledger if ledger else 0.0)

    @rule(tasks=st.lists(TASKS, min_size=1, max_size=4))
    def send_tasks(self, tasks: list[Request]) -> None:
        for task in tasks:
            self._send(self._task(task), None)

    @rule(task=TASKS, request=HISTOGRAMS)
    def send_a_task_with_a_histogram(self, task: Request, request: Request) -> None:
        self._send(self._task(task), self._histogram(request))

    @rule(requests=st.lists(HISTOGRAMS, min_size=1, max_size=4))
    def send_histograms(self, requests: list[Request]) -> None:
        for request in requests:
            self._send(None, self._histogram(request))

    @precondition(lambda self: self.offers)
    @rule(index=st.integers(0, 100))
    def repeat_a_task(self, index: int) -> None:
        self._send(self.offers[index % len(self.offers)], None)

    @rule(garbage=st.sampled_from(GARBAGE))
    def send_garbage(self, garbage: bytes) -> None:
        self.server.raw = [garbage]
        self._poll()

    @rule(disk=st.integers(0, 2), hours=st.sampled_from([0, 1, 25]))
    def restart(self, disk: int, hours: int) -> None:
        self.vehicles.pop().close()
        self.clock.advance(3600.0 * hours)
        self.vehicles.append(self._vehicle(disk))
        self.server.num_examples = (8, 8, 10)[disk]

    @rule()
    def change_to_another_process(self) -> None:
        if len(self.vehicles) == 1:
            self.vehicles.append(self._vehicle(0))
        self.vehicles.reverse()

    @invariant()
    def every_output_is_on_the_ledger(self) -> None:
        if len(self.server.view) > self.checked:
            self.checked = len(self.server.view)
            assert Counter(self.server.view.values()) <= Counter(self._ledger())

    def _task(self, task: Request) -> Offered:
        facts = dict(task)
        return self.server.offer(VARIANTS[facts.pop("variant")], lies=LIES[facts.pop("lie")], **facts)

    def _histogram(self, request: Request) -> Offered:
        facts = dict(request)
        return self.server.offer_histogram(VARIANTS[facts.pop("variant")], spec=SPECS[facts.pop("spec")], **facts)

    def _send(self, task: Offered | None, histogram: Offered | None) -> None:
        self.server.task, self.server.histogram = task, histogram
        if task is not None:
            self.offers.append(task)
            self.figures.tasks += 1
        self._poll()

    def _poll(self) -> None:
        DRAWS.seen.clear()
        try:
            self.vehicles[-1].poll()
        except FedvitError:
            self.figures.refusals += 1

    def _vehicle(self, disk: int) -> Vehicle:
        home = self.folder / "home"
        return Vehicle(self.server.client(), CLIENT, self.disks[disk], home, policy=POLICY, clock=self.clock)

    def _ledger(self) -> list[tuple[Event, int]]:
        return [spend_of(entry.charge) for entry in self.reader.ledger.entries()]

    @staticmethod
    def _epsilon(spends: Any) -> float:
        whole: Counter[Event] = Counter()
        for event, times in spends:
            whole[event] += times
        return epsilon_pld(whole, DELTA) if whole else 0.0
