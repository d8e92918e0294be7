"""Lazy features: a data set's records as inputs of a model's body, each image being read on first use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedvit.data.records import ImageSource, Record, load_images
from fedvit.models.vision import VisionModel

# Records are read in fixed groups of neighbours: the images that share a pass through the prefix affect the last bits
# of its output, and a repeated step must get the same features.
_GROUP = 64


class LazyFeatures:
    """Implements :class:`fedvit.clients.local.Features`.

    If the frozen prefix has weights, its output is cached, because it is expensive to compute. Otherwise the pixels are
    cached, which need a quarter of the memory. The cache is in host memory, not on a GPU.

    Args:
        model: on the device that computes the prefix.
        records: of ``source``; an index refers to this sequence.
    """

    def __init__(self, model: VisionModel, source: ImageSource, records: Sequence[Record]) -> None:
        self._model, self._source, self._records = model, source, tuple(records)
        self._device = next(model.body.parameters()).device
        self._caches_output = any(True for _ in model.prefix.parameters())
        self._loaded = np.zeros(-(-len(self._records) // _GROUP), np.bool_)
        self._cache: Tensor | None = None

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Features [B, ...] of the records of these indices [B].

        Raises:
            DataError: an image cannot be read or decoded; the message names its key.
        """
        for group in np.unique(index.numpy() // _GROUP):
            if not self._loaded[group]:
                self._load(int(group))
        if self._cache is None:
            return self._model.features(self._pixels(range(0)).to(self._device))
        values = self._cache[index]
        return values if self._caches_output else self._model.features(values.to(self._device))

    def _load(self, group: int) -> None:
        members = range(group * _GROUP, min((group + 1) * _GROUP, len(self._records)))
        values = self._pixels(members)
        if self._caches_output:
            values = self._model.features(values.to(self._device)).cpu()
        if self._cache is None:
            self._cache = torch.empty((len(self._records), *values.shape[1:]), dtype=values.dtype)
        self._cache[members.start : members.stop] = values
        self._loaded[group] = True

    def _pixels(self, members: range) -> Tensor:
        records = [self._records[index] for index in members]
        return torch.from_numpy(load_images(self._source, records, self._model.image_size))
