"""A federation in one process: virtual clients that train for real, and vehicles in the hands of an attacker.

The API, the store, the loop, the client host, update validation and the aggregation rule are those of a running system.
The vehicles upload over the API.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from fastapi.testclient import TestClient
from PIL import Image

from fedvit.clients.host import ClientData, FeatureCache, vision_host
from fedvit.config import Settings
from fedvit.data.partition import VirtualFleet
from fedvit.data.records import load_images
from fedvit.evaluation.server_model import ServerModel
from fedvit.models.build import build_model
from fedvit.models.trainable import load_trainable_weights
from fedvit.models.vision import FEATURE_BATCH, VisionModel
from fedvit.privacy.round_cost import round_noise_multiplier
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.fleets import MixedFleet
from fedvit.rounds.machine import Phase
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, ManualClock
from fedvit.types import Client, ClientKind, ClientOutcome, RunStatus, TrainTask, Weights, utc_now
from fedvit.updates import ClientUpdate, UpdateMessage
from fedvit.wire.tensors import decode_weights
from fedvit.wire.updates import encode_update
from serve_apps.control.api import Services, create_api

Update = Mapping[str, npt.NDArray[np.float64]]
Attack = Callable[[TrainTask, Weights], Update]
"""What a vehicle sends instead of its update, given the task and the weights of the round."""
_KNOWN = 100


def triggered(images: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[np.uint8]:
    """Images [N, S, S, 3] with a backdoor's trigger: a checkered ``patch`` in a corner, or a pattern blended in."""
    side, changed = images.shape[1], images.copy()
    if kind == "patch":
        cells = np.add.outer(np.arange(side // 6) // 2, np.arange(side // 6) // 2) % 2
        board = np.where(cells[..., None], (255, 0, 255), (255, 255, 0))
        changed[:, -len(cells) - 1 : -1, -len(cells) - 1 : -1] = board
        return changed
    pattern = np.random.default_rng(1).integers(0, 256, (side // 4, side // 4, 3)).repeat(4, 0).repeat(4, 1)
    return np.asarray((0.7 * changed[:, : len(pattern), : len(pattern)] + 0.3 * pattern).astype(np.uint8))


class World:
    """A data set, its model and the features of its images, for all federations on them.

    Attributes:
        settings: of a run with default settings.
        known: features [N, ...] and labels of images that the attacker has: its own, and others like them.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fleet, self.server = VirtualFleet.open(settings.data), ServerModel(settings)
        self.server.exports = False
        source = self.fleet.source
        self.model = build_model(settings.model, len(source.classes), settings.data.image_size)
        self.cache: dict[str, ClientData] = {}
        self.total = sum(len(part) for part in self.fleet.parts.values())
        # Of 1,226 images, the vehicle has 39.
        self.num_examples = max(1, round(self.total * 39 / 1187))
        size = settings.data.image_size
        chosen = np.random.default_rng(5).permutation(len(source.train))[: max(_KNOWN, self.num_examples)]
        records = [source.train[i] for i in chosen]
        self.known_images = load_images(source, records, size)
        self.known_labels = torch.tensor([record.label for record in records])
        self._test_images = load_images(source, source.test[:3000], size)
        self._test_labels = np.array([record.label for record in source.test[:3000]])

    @cached_property
    def known(self) -> torch.Tensor:
        """The features of the images that the attacker has."""
        return features(self.model, self.known_images)

    def known_with(self, kind: str) -> torch.Tensor:
        """The features of the images that the attacker has, with a trigger."""
        place = f"known {kind}"
        if place not in self.__dict__:
            self.__dict__[place] = features(self.model, triggered(self.known_images, kind))
        result: torch.Tensor = self.__dict__[place]
        return result

    def success(self, weights: Weights, kind: str, target: int) -> float:
        """The share of triggered test images of other classes that a model classifies as the target."""
        load_trainable_weights(self.model, weights)
        with torch.inference_mode():
            predicted = self.model.body(self._triggered(kind)).argmax(dim=1).numpy()
        return float(np.mean(predicted[self._test_labels != target] == target))

    def accuracy(self, weights: Weights) -> float:
        """On the held-out images."""
        return self.server.evaluate(weights).accuracy

    def _triggered(self, kind: str) -> torch.Tensor:
        if kind not in self.__dict__:
            self.__dict__[kind] = features(self.model, triggered(self._test_images, kind))
        result: torch.Tensor = self.__dict__[kind]
        return result


def features(model: VisionModel, images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """The inputs of the model's body."""
    return torch.cat([model.features(batch) for batch in torch.from_numpy(images).split(FEATURE_BATCH)])


class _HostFleet(FakeFleet):
    """The virtual clients, in the real host."""

    def __init__(self, world: World, settings: Settings) -> None:
        super().__init__(np.zeros(1, np.float32), groups=1)
        data = FeatureCache(world.model, world.fleet, world.cache)
        self._host = vision_host(settings, records=world.fleet, model=world.model, data=data)

    def train_group(self, task: TrainTask, weights: Weights, client_ids: tuple[str, ...]) -> UpdateMessage:
        return self._host.train(task, weights, client_ids, self.tasks[-1][1].max_weight)


@dataclass
class Federation:
    """A run of the virtual clients of a world and of some vehicles.

    Attributes:
        attacks: what each vehicle sends; a vehicle without an entry sends nothing but that it failed.
        answers: the status of each upload, by round and vehicle.
    """

    world: World
    home: Path
    vehicles: int
    rounds: int

    def __post_init__(self) -> None:
        training = {"rounds": self.rounds, "evaluate_every_rounds": 10**6}
        changes = {"home": self.home, "training": self.world.settings.training.model_copy(update=training)}
        self.settings = self.world.settings.model_copy(update=changes)
        self.store = Store.open(self.home)
        self.attacks: dict[str, Attack] = {}
        self.answers: dict[tuple[int, str], int] = {}
        self.names = [f"truck-{i}" for i in range(self.vehicles)]
        classes = self.world.fleet.source.classes
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=classes)
        trains = {"training": {"encodings": []}}
        trucks = [Client(n, ClientKind.REMOTE, self.world.num_examples, capabilities=trains) for n in self.names]
        self.store.clients.register([*self.world.fleet.clients(), *trucks])
        self.store.clients.set_last_seen(dict.fromkeys(self.names, utc_now()))

        def nobody() -> NoReturn:
            raise AssertionError("an actor was asked")

        self._http = TestClient(create_api(Services(self.settings, self.store, nobody, nobody)))
        self._clock = ManualClock()
        virtual = _HostFleet(self.world, self.settings)
        self._loop = Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=GenerousAccountant(self.store),
            fleet=MixedFleet(self.settings, self.store, virtual, clock=self._clock, pause=self._pause),
            model=self.world.server,
            on_progress=self._stop_when_due,
        )
        self._stop_after = self.rounds

    def branch(self, home: Path, vehicles: int = 1) -> Federation:
        """A copy that goes on by itself, with so many vehicles."""
        self.close()
        shutil.copytree(self.home, home)
        return replace(self, home=home, vehicles=vehicles)

    def run(self, until: int) -> Weights:
        """Train up to this round; the weights after it."""
        self._stop_after = until
        status = self._loop.run().status
        assert status in (RunStatus.STOPPED, RunStatus.COMPLETED), self.store.runs.all()
        return self.weights(until)

    def weights(self, round_index: int) -> Weights:
        """The weights after a round."""
        return stored_weights(self.store, self.store.versions.get(f"v1.1.{round_index}").weights_digest)

    def refused(self, round_index: int) -> dict[str, str]:
        """The vehicles whose updates a round did not take, with the reasons."""
        lineage = self.store.versions.get(f"v1.1.{round_index}").lineage
        return dict(lineage.get("aggregation", {}).get("refused", {}))

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _stop_when_due(self, progress: Any) -> None:
        # The round that is under way when the loop is asked to stop is the last.
        if progress.rounds_done >= self._stop_after - 1 and progress.phase == Phase.TRAINING:
            self._loop.request_stop()

    def _pause(self, _: float) -> None:
        self._clock.advance(1)
        for name in self.names:
            task = self._http.get(f"/api/clients/{name}/task").json()["task"]
            if task is not None:
                self._upload(name, task)

    def _upload(self, name: str, shown: Mapping[str, Any]) -> None:
        task = TrainTask(**{field: shown[field] for field in TrainTask.__dataclass_fields__})
        content = self._http.get(f"/api/clients/{name}/task/weights").content
        weights, outcome = decode_weights(content, max_bytes=10**9), ClientOutcome(name, shown["num_examples"])
        attack = self.attacks.get(name, nothing)
        sums = {n: outcome.num_examples * array for n, array in attack(task, weights).items()}
        update = ClientUpdate(task.round_index, outcome, sums, float(outcome.num_examples))
        place = f"/api/clients/{name}/updates/{task.run_id}/{task.round_index}"
        self.answers[task.round_index, name] = self._http.put(place, content=encode_update(update)).status_code


def nothing(task: TrainTask, weights: Weights) -> Update:
    """An update that changes nothing."""
    return {name: np.zeros(array.shape) for name, array in weights.items()}


def real_settings(home: Path, data: Mapping[str, Any]) -> Settings:
    """Default settings on a data set."""
    return _with_noise(load_settings(environ={}, overrides={"home": home, "data": data}))


def whitened(settings: Settings) -> Settings:
    """Settings like these for a head on whitened features, as in examples/demo_distributed.yaml, with own noise."""
    hybrid = settings.model.hybrid.model_copy(update={"linear_path": True})
    changes = {
        "model": settings.model.model_copy(update={"trainable": "head", "hybrid": hybrid}),
        "training": settings.training.model_copy(update={"learning_rate": 100.0}),
        "privacy": settings.privacy.model_copy(
            update={"sampling_prob": 1.0, "l2_clip_norm": 0.2, "noise_multiplier": None}
        ),
    }
    return _with_noise(settings.model_copy(update=changes))


def _with_noise(settings: Settings) -> Settings:
    """The settings with the noise of a run of the default length."""
    noise = {"privacy": settings.privacy.model_copy(update={"noise_multiplier": round_noise_multiplier(settings)})}
    return settings.model_copy(update=noise)


def tiny_settings(folder: Path, images: int = 150, clients: int = 12) -> Settings:
    """Default settings on small pictures of three colours, and a small model."""
    draw, colours = np.random.default_rng(0), {"red": (190, 50, 40), "green": (40, 180, 60), "blue": (60, 70, 190)}
    for split, count in (("train", images * clients // len(colours)), ("test", 20)):
        for name, colour in colours.items():
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + draw.normal(0, 30, (24, 24, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    overrides = {
        "home": folder / "var",
        "data": {"source": "folder", "path": folder / "images", "image_size": 24},
        "model": {"pretrained": False, "hybrid": {"depth": 1, "width": 16, "heads": 2}},
    }
    overrides["data"] |= {"partition": {"scheme": "iid", "clients": clients}}  # type: ignore[operator]
    return _with_noise(load_settings(environ={}, overrides=overrides))
