"""Noised histograms of the clients on one host."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedvit.data.records import ImageSource, Record, load_images
from fedvit.drift.measures import ClientRecords, Counts, Floats, embeddings_of, filtered, noised_histogram, risk_of
from fedvit.errors import DataError
from fedvit.models.vision import FEATURE_BATCH, VisionModel
from fedvit.privacy.randomness import derive_secret
from fedvit.types import ImageArray, LabelArray
from fedvit.wire.histograms import RISK, ClientHistogram, HistogramRequest

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Counted:
    counts: Counts
    labels: LabelArray
    digest: str


class HistogramClient:
    """Computes histograms of clients whose records are on this host.

    Counts of a client stay in memory, without noise, for its next histogram with the same edges; images do not.

    Args:
        records: the records of a client.
        root_secret: key from which clients' keys are derived.
        context_digest: of the settings and the model; see :class:`fedvit.clients.host.ClientHost`.
    """

    def __init__(
        self,
        model: VisionModel,
        source: ImageSource,
        image_size: int,
        records: Callable[[str], Sequence[Record]],
        root_secret: bytes,
        context_digest: str = "",
    ) -> None:
        self._model, self._source, self._image_size = model, source, image_size
        self._records, self._root_secret, self._context_digest = records, root_secret, context_digest
        self._counted: dict[tuple[str, str], _Counted] = {}

    def histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> list[ClientHistogram]:
        """Histograms of all clients that have records; failures are logged and affect no other client."""
        results = []
        for client_id in sorted(client_ids):
            try:
                results.append(self.histogram(request, client_id))
            except Exception as error:
                _LOG.warning("no histogram of %s: %s", client_id, error)
        return results

    def histogram(self, request: HistogramRequest, client_id: str) -> ClientHistogram:
        """The histogram of one client.

        Raises:
            DataError: the client has no records.
        """
        counted = self._count(request, client_id)
        # Bound to this model and these records, like the noise of an update.
        derived_from = f"{self._context_digest}/{counted.digest}"
        secret = derive_secret(self._root_secret, f"{client_id}/histogram/{derived_from}")
        counts = counted.counts.copy()
        counts[request.spec.slices[RISK]] = risk_of(counted.labels, request.spec)
        return noised_histogram(request, client_id, counts, len(counted.labels), secret)

    def output_digest(self, request: HistogramRequest, client_id: str) -> str:
        """SHA-256, hex, of all that determines the client's histogram: the output's id, this model, and its records.

        Raises:
            DataError: the client has no records.
        """
        counted = self._count(request, client_id)
        output = request.output_id(client_id, len(counted.labels))
        return hashlib.sha256(f"{output}/{self._context_digest}/{counted.digest}".encode()).hexdigest()

    def _count(self, request: HistogramRequest, client_id: str) -> _Counted:
        key = client_id, request.spec.basis
        if key not in self._counted:
            records = self._records(client_id)
            if not records:
                raise DataError(f"Client {client_id} has no records to histogram.")
            loaded = self._load(records)
            digest = hashlib.sha256(loaded.images.tobytes() + loaded.labels.tobytes()).hexdigest()
            self._counted[key] = _Counted(loaded.counts(request.spec), loaded.labels, digest)
        return self._counted[key]

    def _load(self, records: Sequence[Record]) -> ClientRecords:
        images, sound, broken = [], [], []
        for record in records:
            try:
                images.append(load_images(self._source, [record], self._image_size))
                sound.append(record.label)
            except DataError:
                broken.append(record.label)
        empty = np.empty((0, self._image_size, self._image_size, 3), np.uint8)
        whole = np.concatenate([*images, empty])
        return ClientRecords(whole, embedded(self._model, whole), np.array(sound + broken, dtype=np.int64))


def embedded(model: VisionModel, images: ImageArray) -> Floats:
    """Public embeddings [N, D] of images: of the model's frozen stem, or of fixed filters without one."""
    if next(model.prefix.parameters(), None) is None:
        return filtered(images)
    batches = torch.from_numpy(images).split(FEATURE_BATCH)
    return np.concatenate([embeddings_of(model.features(batch).numpy()) for batch in batches])
