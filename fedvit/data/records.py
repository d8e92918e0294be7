"""Records and images of a data set: the interface of data sources, and loading of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from fedvit.data.trees import FileTree
from fedvit.errors import DataError
from fedvit.types import ImageArray
from fedvit.wire.images import decode_image

_CHECKED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image.

    ``key`` is its stable path inside the data set, the same for a folder and a zip. ``unit`` is the natural privacy
    unit that it belongs to (such as a GTSRB track), if there is one.
    """

    key: str
    label: int
    unit: str | None = None


class ImageSource(Protocol):
    """A data set with a training and a test split. Implementations can be pickled, and read from several threads."""

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a record's label is an index into them."""

    @property
    def train(self) -> tuple[Record, ...]:
        """The clients' records."""

    @property
    def test(self) -> tuple[Record, ...]:
        """The records for evaluation on the server."""

    def read(self, record: Record) -> bytes:
        """The encoded image file of a record.

        Raises:
            DataError: it cannot be read.
        """


@dataclass(frozen=True, slots=True)
class TreeSource:
    """A data set whose records are files in a tree.

    ``folders`` pairs the beginnings of keys with the folders in the tree that they stand for.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Record, ...]
    test: tuple[Record, ...]
    tree: FileTree
    folders: tuple[tuple[str, str], ...] = (("", ""),)

    def read(self, record: Record) -> bytes:
        return self.tree.read(self.file_of(record))

    def file_of(self, record: Record) -> str:
        """The name in the tree of a record's file."""
        start, place = next(each for each in self.folders if record.key.startswith(each[0]))
        return place + record.key.removeprefix(start)


def load_images(source: ImageSource, records: Sequence[Record], image_size: int) -> ImageArray:
    """The decoded and resized images of ``records``, in order: uint8 RGB [N, image_size, image_size, 3].

    Raises:
        DataError: an image cannot be read or decoded; the message names its key.
    """
    images = np.empty((len(records), image_size, image_size, 3), dtype=np.uint8)
    for i, record in enumerate(records):
        content = source.read(record)
        try:
            # Files of one's own are not bounded like those that others send.
            images[i] = decode_image(content, image_size, max_bytes=None)
        except DataError as error:
            raise DataError(f"{record.key} of {source.name}: {error.message}", cure=error.cure) from error
    return images


def check_images(source: ImageSource, records: Sequence[Record], image_size: int) -> None:
    """Decode every image once, a few at a time in memory.

    Raises:
        DataError: an image cannot be read or decoded; the message names its key.
    """
    for start in range(0, len(records), _CHECKED_AT_ONCE):
        load_images(source, records[start : start + _CHECKED_AT_ONCE], image_size)


_Source = TypeVar("_Source", bound=ImageSource)


def checked(source: _Source, place: object) -> _Source:
    """``source`` itself, after a check that it suffices for training and evaluation; ``place`` is for messages.

    A class without test images is allowed; only its own recall is unknown.

    Raises:
        DataError: a split is empty, a class has no training image, or there is a single class.
    """
    if not source.train:
        raise DataError(f"{place} holds no training image.", cure="Put at least one image into every class.")
    present = {record.label for record in source.train}
    if empty := [name for label, name in enumerate(source.classes) if label not in present]:
        cure = "Add images to it or remove the class."
        raise DataError(f"Class '{empty[0]}' in {place} has no training image.", cure=cure)
    if len(source.classes) < 2:
        cure = "Name a folder with at least two class folders: with one class every model is always right."
        raise DataError(f"{place} holds a single class, '{source.classes[0]}'.", cure=cure)
    if not source.test:
        raise DataError(f"{place} holds no test image.", cure="Add test images: the model is evaluated on them.")
    return source


def check_options(source: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Raise DataError for an option that ``source`` does not have."""
    if unknown := sorted(set(options) - set(allowed)):
        cure = f"It knows: {', '.join(allowed)}." if allowed else "It has no options: leave data.options out."
        raise DataError(f"Data source '{source}' has no option '{unknown[0]}'.", cure=cure)
