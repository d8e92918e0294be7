"""Global model on the server: initial weights, evaluation on held-out images, export."""

from __future__ import annotations

import threading
from functools import cached_property

import numpy as np
import torch

from fedvit.aggregation.head import principal_directions
from fedvit.config import Settings
from fedvit.data.records import load_images
from fedvit.data.sources import open_source
from fedvit.drift.client import embedded
from fedvit.drift.measures import spec_of
from fedvit.evaluation.evaluate import evaluate
from fedvit.models.build import build_model
from fedvit.models.export import complexity, export_variant, make_variant, time_onnx
from fedvit.models.trainable import frozen_weights, head_inputs, head_name, load_trainable_weights, trainable_weights
from fedvit.models.vision import FEATURE_BATCH
from fedvit.ports import ExportedModel, ModelBenchmark
from fedvit.types import Evaluation, FloatArray, ImageArray, LabelArray, Variant, Weights
from fedvit.wire.histograms import HistogramSpec

_MEASURED_IMAGES = 1000


class ServerModel:
    """Implements :class:`fedvit.ports.ServerModelPort` with a real model and the data set's test images.

    The held-out images are the server's own; no client data is used. The class is thread-safe: a lock guards the model
    while it has the weights of a call.
    """

    exports = True

    def __init__(self, settings: Settings) -> None:
        self._lock = threading.RLock()
        self._image_size = settings.data.image_size
        self._source = open_source(settings.data)
        self._model = build_model(settings.model, len(self._source.classes), self._image_size)
        self._initial = trainable_weights(self._model)
        self.head = head_name(self._model)

    def initial_weights(self) -> Weights:
        return self._initial

    def frozen_weights(self) -> Weights:
        return frozen_weights(self._model)

    def head_basis(self, weights: Weights, directions: int) -> FloatArray | None:
        if self.head is None:
            return None
        with self._lock:
            load_trainable_weights(self._model, weights)
            inputs = head_inputs(self._model, self._features[self._measured()])
        return principal_directions(inputs.numpy(), directions)

    def evaluate(self, weights: Weights) -> Evaluation:
        with self._lock:
            load_trainable_weights(self._model, weights)
            labels = torch.from_numpy(self._labels)
            return evaluate(self._model, self._features, labels, self._source.classes)

    def predict(self, weights: Weights) -> LabelArray:
        """Class indices by torch for the held-out images, in the order of the data set."""
        with self._lock, torch.inference_mode():
            load_trainable_weights(self._model, weights)
            batches = self._features.split(FEATURE_BATCH)
            return np.concatenate([self._model.body(b).argmax(dim=1).numpy() for b in batches])

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        """ONNX file of one variant; agreement is with this model in fp32 torch, on the held-out images."""
        with self._lock:
            reference = self.predict(weights)
            content = export_variant(self._model, variant, self._image_size)
            size = complexity(make_variant(self._model, variant))
        predicted = time_onnx(content, self._images)[0].argmax(axis=1)
        agreement, accuracy = float(np.mean(predicted == reference)), float(np.mean(predicted == self._labels))
        return ExportedModel(content, agreement=agreement, accuracy=accuracy, complexity=size)

    def benchmark(self, content: bytes, limit: int | None = None) -> ModelBenchmark:
        """Run an exported model on held-out images, spread evenly over the data set."""
        count = len(self._images) if limit is None else min(limit, len(self._images))
        chosen = np.linspace(0, len(self._images) - 1, count).round().astype(np.int64)
        logits, elapsed_ms = time_onnx(content, self._images[chosen])
        p50_ms, p95_ms = np.percentile(elapsed_ms, [50, 95])
        return ModelBenchmark(tuple(logits.argmax(axis=1).tolist()), float(p50_ms), float(p95_ms))

    def histogram_spec(self) -> HistogramSpec:
        """Edges by the held-out images, spread evenly over the data set where they are many."""
        with self._lock:
            images = self._images[self._measured()]
            return spec_of(images, embedded(self._model, images), len(self._source.classes))

    def _measured(self) -> LabelArray:
        """Indices of at most so many held-out images, spread evenly over the data set."""
        count = len(self._source.test)
        return np.linspace(0, count - 1, min(count, _MEASURED_IMAGES)).astype(np.int64)

    @cached_property
    def _images(self) -> ImageArray:
        return load_images(self._source, self._source.test, self._image_size)

    @cached_property
    def _labels(self) -> LabelArray:
        return np.array([record.label for record in self._source.test], dtype=np.int64)

    @cached_property
    def _features(self) -> torch.Tensor:
        images = torch.from_numpy(self._images)
        return torch.cat([self._model.features(batch) for batch in images.split(FEATURE_BATCH)])
