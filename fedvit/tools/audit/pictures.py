"""Small data sets in memory for audits that need image files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fedvit.data.records import Record
from fedvit.tools.audit.subjects import CLASSES, IMAGE_SIZE
from fedvit.types import ImageArray


@dataclass(frozen=True, slots=True)
class Pictures:
    """One client's images and labels, as a data set and as its division among clients.

    Implements :class:`fedvit.data.records.ImageSource` and :class:`fedvit.clients.host.ClientRecords`.

    Args:
        files: encoded images, by key.
        labels: by key, in the order of the records.
    """

    files: dict[str, bytes]
    labels: dict[str, int]
    name: str = "audit"
    classes: tuple[str, ...] = tuple(f"class {i}" for i in range(CLASSES))
    test: tuple[Record, ...] = ()

    @classmethod
    def of(cls, images: ImageArray, labels: Sequence[int]) -> Pictures:
        """The data set of these images [N, S, S, 3] and labels [N]."""
        files = {f"{index:04d}.png": png(image) for index, image in enumerate(images)}
        return cls(files, dict(zip(files, labels, strict=True)))

    @property
    def source(self) -> Pictures:
        """The data set."""
        return self

    @property
    def train(self) -> tuple[Record, ...]:
        """All records."""
        return tuple(Record(key, label) for key, label in self.labels.items())

    def records(self, client_id: str) -> tuple[Record, ...]:
        """All records, of whatever client."""
        return self.train

    def read(self, record: Record) -> bytes:
        """The file of a record."""
        return self.files[record.key]

    def without(self, index: int) -> Pictures:
        """The same without one record."""
        gone = list(self.labels)[index]
        labels = {key: label for key, label in self.labels.items() if key != gone}
        return Pictures(self.files, labels)

    def damaged(self, index: int) -> Pictures:
        """The same with a file that cannot be decoded."""
        return Pictures({**self.files, list(self.labels)[index]: b"no image"}, self.labels)


def random_images(count: int, seed: int = 7) -> ImageArray:
    """Images [N, S, S, 3]; the very first number of each is its position, by which audits recognise the record."""
    images = np.random.default_rng(seed).integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images


def png(image: ImageArray) -> bytes:
    """An image [S, S, 3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()
