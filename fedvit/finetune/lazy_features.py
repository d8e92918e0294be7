"""The records of a data set as a model's body reads them, each image read when it is drawn for the first time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedvit.data.images import load_images
from fedvit.data.sources import ImageSource, Record
from fedvit.models.vision import VisionModel

# Neighbours by index that are read together, whoever of them is drawn: which images share a pass through the prefix
# shows in the last bits, and a step that is repeated has to find the same features.
_GROUP = 64


class DrawnFeatures:
    """Implements :class:`fedvit.clients.local.Features`.

    Where the frozen prefix has weights its output is kept, because computing it again is dear; else the pixels are, in
    a quarter of the memory. Either way on the host, not on a GPU.

    Args:
        model: on the device that is to compute the prefix.
        records: those of ``source`` that are counted by index.
    """

    def __init__(self, model: VisionModel, source: ImageSource, records: Sequence[Record]) -> None:
        self._model, self._source, self._records = model, source, tuple(records)
        self._device = next(model.body.parameters()).device
        self._keeps_output = any(True for _ in model.prefix.parameters())
        self._known = np.zeros(-(-len(self._records) // _GROUP), np.bool_)
        self._kept: Tensor | None = None

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Features [B, ...] of the records of these indices [B].

        Raises:
            DataError: an image cannot be read or decoded; the message names its key.
        """
        for group in np.unique(index.numpy() // _GROUP):
            if not self._known[group]:
                self._read(int(group))
        if self._kept is None:
            return self._model.features(self._pixels(range(0)).to(self._device))
        kept = self._kept[index]
        return kept if self._keeps_output else self._model.features(kept.to(self._device))

    def _read(self, group: int) -> None:
        members = range(group * _GROUP, min((group + 1) * _GROUP, len(self._records)))
        fresh = self._pixels(members)
        if self._keeps_output:
            fresh = self._model.features(fresh.to(self._device)).cpu()
        if self._kept is None:
            self._kept = torch.empty((len(self._records), *fresh.shape[1:]), dtype=fresh.dtype)
        self._kept[members.start : members.stop] = fresh
        self._known[group] = True

    def _pixels(self, members: range) -> Tensor:
        chosen = [self._records[index] for index in members]
        return torch.from_numpy(load_images(self._source, chosen, self._model.image_size))
