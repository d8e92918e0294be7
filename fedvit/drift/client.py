"""Histograms of a host's clients: images are measured once; each histogram is noised with the client's own key."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedvit.data.records import load_images
from fedvit.data.sources import ImageSource, Record
from fedvit.drift.measures import Counts, Floats, Holding, embeddings_of, filtered, risk_of, sketched
from fedvit.errors import DataError
from fedvit.models.vision import FEATURE_BATCH, VisionModel
from fedvit.privacy.secrets import derive_secret
from fedvit.types import ImageArray, LabelArray
from fedvit.wire.histograms import RISK, ClientHistogram, HistogramRequest

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Counted:
    counts: Counts
    labels: LabelArray
    digest: str


class HistogramClient:
    """Makes histograms of clients whose records lie here.

    What was counted of a client is kept in memory, without noise, for its next histogram under the same edges;
    images are not.

    Args:
        records: of a client.
        root_secret: what clients' keys are derived from.
    """

    def __init__(
        self,
        model: VisionModel,
        source: ImageSource,
        image_size: int,
        records: Callable[[str], Sequence[Record]],
        root_secret: bytes,
    ) -> None:
        self._model, self._source, self._image_size = model, source, image_size
        self._records, self._root_secret = records, root_secret
        self._counted: dict[tuple[str, str], _Counted] = {}

    def histograms(self, order: HistogramRequest, client_ids: Sequence[str]) -> list[ClientHistogram]:
        """A histogram of each client that has one to give; another's fault is logged and is its own."""
        found = []
        for client_id in sorted(client_ids):
            try:
                found.append(self.histogram(order, client_id))
            except Exception as error:
                _LOG.warning("no histogram of %s: %s", client_id, error)
        return found

    def histogram(self, order: HistogramRequest, client_id: str) -> ClientHistogram:
        """One client's.

        Raises:
            DataError: it has no records.
        """
        counted = self._count(order, client_id)
        # Bound to the very records, as the noise of an update is.
        secret = derive_secret(self._root_secret, f"{client_id}/histogram/{counted.digest}")
        counts = counted.counts.copy()
        counts[order.spec.slices[RISK]] = risk_of(counted.labels, order.spec)
        return sketched(order, client_id, counts, len(counted.labels), secret)

    def _count(self, order: HistogramRequest, client_id: str) -> _Counted:
        key = client_id, order.spec.basis
        if key not in self._counted:
            records = self._records(client_id)
            if not records:
                raise DataError(f"Client {client_id} has no records to histogram.")
            held = self._held(records)
            digest = hashlib.sha256(held.images.tobytes() + held.labels.tobytes()).hexdigest()
            self._counted[key] = _Counted(held.counts(order.spec), held.labels, digest)
        return self._counted[key]

    def _held(self, records: Sequence[Record]) -> Holding:
        images, sound, broken = [], [], []
        for record in records:
            try:
                images.append(load_images(self._source, [record], self._image_size))
                sound.append(record.label)
            except DataError:
                broken.append(record.label)
        empty = np.empty((0, self._image_size, self._image_size, 3), np.uint8)
        whole = np.concatenate([*images, empty])
        return Holding(whole, embedded(self._model, whole), np.array(sound + broken, dtype=np.int64))


def embedded(model: VisionModel, images: ImageArray) -> Floats:
    """Public embeddings [N, D] of images: by the model's frozen stem, or by fixed filters where it has none."""
    if next(model.prefix.parameters(), None) is None:
        return filtered(images)
    batches = torch.from_numpy(images).split(FEATURE_BATCH)
    return np.concatenate([embeddings_of(model.features(batch).numpy()) for batch in batches])
