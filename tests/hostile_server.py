"""A control server that sends a vehicle whatever a test wants, and keeps what it gets. It opens no port."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from fedvit.aggregation.registry import rule_for
from fedvit.client import FedvitClient
from fedvit.config import ModelConfig, Settings
from fedvit.models.build import build_model
from fedvit.models.trainable import frozen_weights, trainable_weights
from fedvit.models.vision import VisionModel
from fedvit.privacy.randomness import output_id
from fedvit.rounds.context import train_task
from fedvit.settings import load_settings
from fedvit.types import TrainTask, Weights
from fedvit.wire.histograms import HistogramRequest, HistogramSpec
from fedvit.wire.tensors import encode_weights, weights_digest

URL = "http://hostile"
CLASSES = ("green", "red")
CLIENT = "truck-7"
NOISE = 4.0
SPEC = HistogramSpec({"brightness": (64.0, 128.0), "contrast": (10.0,)}, len(CLASSES))


def write_images(folder: Path, count: int, *, seed: int = 0, size: int = 16) -> Path:
    """``count`` noisy images of each class."""
    draw = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def settings_with(**changes: Any) -> Settings:
    """Settings of a run; ``model``, ``training``, ``privacy`` and ``data`` hold what differs from a tiny model."""
    hybrid = {"depth": 1, "width": 16, "heads": 2}
    model = {"pretrained": False, "trainable": "head", "hybrid": hybrid, **changes.get("model", {})}
    return load_settings(
        environ={},
        overrides={
            "data": {"image_size": 32, **changes.get("data", {})},
            "model": model,
            "training": changes.get("training", {}),
            "privacy": {"noise_multiplier": NOISE, **changes.get("privacy", {})},
        },
    )


@dataclass(slots=True)
class Offered:
    """A task or a histogram request as the server sends it, and what determines it."""

    body: dict[str, Any]
    request: TrainTask | HistogramRequest
    weights: Weights = field(default_factory=dict)


@dataclass(slots=True)
class HostileServer(httpx.BaseTransport):
    """Answers the requests of one vehicle.

    Attributes:
        num_examples: what the vehicle registered.
        build: makes the model of settings; the vehicle must make the same one.
        task, histogram: what the vehicle gets when it asks.
        raw: the next answers to its polls instead, as they go over the line.
        updates, histograms: what came, each with its path.
    """

    num_examples: int = 8
    build: Any = build_model
    task: Offered | None = None
    histogram: Offered | None = None
    raw: list[bytes | httpx.Response] = field(default_factory=list)
    updates: list[tuple[str, bytes]] = field(default_factory=list)
    histograms: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def client(self) -> FedvitClient:
        """A client whose requests come here."""
        return FedvitClient(URL, transport=self, sleep=lambda _: None)

    def offer(
        self,
        settings: Settings,
        *,
        run_id: str = "run-0001",
        round_index: int = 1,
        encoding: str = "float32",
        classes: Sequence[str] = CLASSES,
        shift: float = 0.0,
        task: Mapping[str, Any] | None = None,
        lies: Mapping[str, Any] | None = None,
    ) -> Offered:
        """A task for the vehicle, consistent in itself.

        Args:
            shift: added to every base weight.
            task: fields of the task that differ from what the settings say; the output's id follows them.
            lies: fields of the body that are changed afterwards.
        """
        frozen, base = _parts(self.build, settings.model, len(classes), settings.data.image_size)
        weights = {name: array + np.float32(shift) for name, array in base.items()}
        weights |= rule_for(settings).broadcast(weights, {})
        facts = train_task(
            settings,
            run_id,
            round_index,
            base_digest=weights_digest(weights),
            data_digest="d" * 64,
            noise_multiplier=settings.privacy.noise_multiplier or NOISE,
            l2_clip_norm=settings.privacy.l2_clip_norm,
            context_digest=settings.context_digest(classes, frozen),
        )
        whole = TrainTask(**{**asdict(facts), **(task or {})})
        body = {
            **asdict(whole),
            "num_examples": self.num_examples,
            "output_id": output_id(whole, CLIENT, self.num_examples),
            "encoding": encoding,
            "frozen_digest": frozen,
            "image_size": settings.data.image_size,
            "classes": list(classes),
            "settings": settings.training_identity(),
        }
        return Offered({**body, **(lies or {})}, whole, weights)

    def offer_histogram(
        self,
        settings: Settings,
        *,
        run_id: str = "run-0001",
        round_index: int = 1,
        noise_multiplier: float = 5.25,
        spec: HistogramSpec = SPEC,
    ) -> Offered:
        """A histogram request for the vehicle, consistent in itself."""
        frozen, _ = _parts(self.build, settings.model, len(CLASSES), settings.data.image_size)
        context = settings.context_digest(CLASSES, frozen)
        request = HistogramRequest(run_id, round_index, noise_multiplier, "record", spec, context)
        output = request.output_id(CLIENT, self.num_examples)
        body = {"num_examples": self.num_examples, "output_id": output, "order": request.to_json()}
        return Offered(body, request)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The answer to one request of the vehicle."""
        path = request.url.path
        if request.method == "GET" and path.endswith("/task"):
            answer = self.raw.pop(0) if self.raw else self.answer()
            return answer if isinstance(answer, httpx.Response) else httpx.Response(200, content=answer)
        if request.method == "GET" and path.endswith("/task/weights"):
            assert self.task is not None
            return httpx.Response(200, content=encode_weights(self.task.weights))
        assert request.method == "PUT", path
        _, _, _, client_id, _, run_id, round_index = path.split("/")
        receipt = {"client_id": client_id, "run_id": run_id, "round_index": int(round_index)}
        if "/histograms/" in path:
            self.got_histogram(path, tuple(json.loads(request.read())["counts"]))
            return httpx.Response(200, json={**receipt, "kept": True})
        self.got_update(path, request.read())
        nothing = {"reason": None, "folded_in": None, "version": None}
        return httpx.Response(202, json={**receipt, "status": "received", **nothing})

    def answer(self, **lies: Any) -> bytes:
        """The body of the answer to a poll, as JSON that may hold NaN; ``lies`` replace fields of it."""
        task, histogram = (offered and offered.body for offered in (self.task, self.histogram))
        body = {"client_id": CLIENT, "poll_after_s": 0.01, "task": task, "histogram": histogram}
        return json.dumps({**body, **lies}).encode()

    def got_update(self, path: str, content: bytes) -> None:
        """Keep an update."""
        self.updates.append((path, content))

    def got_histogram(self, path: str, counts: tuple[int, ...]) -> None:
        """Keep a histogram."""
        self.histograms.append((path, counts))


def error_of(content: bytes) -> str | None:
    """Why an answer holds no update, as it says itself; None where it holds one."""
    length = int.from_bytes(content[:8], "little")
    facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["update"])
    ((_, _, error),) = facts["outcomes"]
    return None if error is None else str(error)


def _parts(build: Any, config: ModelConfig, classes: int, image_size: int) -> tuple[str, Weights]:
    return _parts_of(build, config.model_dump_json(), classes, image_size)


@lru_cache(maxsize=256)
def _parts_of(build: Any, config: str, classes: int, image_size: int) -> tuple[str, Weights]:
    model: VisionModel = build(ModelConfig.model_validate_json(config), classes, image_size)
    return weights_digest(frozen_weights(model)), trainable_weights(model)
