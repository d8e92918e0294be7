"""What a data set is to the rest of fedvit: labelled records, and a way to read the image behind each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedvit.data.trees import FileTree
from fedvit.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image.

    ``key`` is its stable path inside the data set, the same from a folder and from a zip; ``unit`` the natural privacy
    unit it belongs to (a GTSRB track), if the data set knows one.
    """

    key: str
    label: int
    unit: str | None = None


class ImageSource(Protocol):
    """A data set with a training and a test split. Implementations pickle, and read in several threads."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a record's label is an index into them."""
        ...

    @property
    def train(self) -> tuple[Record, ...]:
        """The records that clients hold."""
        ...

    @property
    def test(self) -> tuple[Record, ...]:
        """The records that the server evaluates on."""
        ...

    def read(self, record: Record) -> bytes:
        """The encoded image file of a record.

        Raises:
            DataError: it cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class TreeSource:
    """A data set whose records are files below ``prefix`` in a tree."""

    name: str
    classes: tuple[str, ...]
    train: tuple[Record, ...]
    test: tuple[Record, ...]
    tree: FileTree
    prefix: str = ""

    def read(self, record: Record) -> bytes:
        """See :meth:`ImageSource.read`."""
        return self.tree.read(self.prefix + record.key)


def checked(source: TreeSource, place: object) -> TreeSource:
    """``source`` itself, once it is known to hold what training and evaluation need; ``place`` is for the message.

    Raises:
        DataError: a split is empty, or a class has no training image.
    """
    check_splits(source.classes, source.train, source.test, place)
    return source


def check_splits(classes: Sequence[str], train: Sequence[Record], test: Sequence[Record], place: object) -> None:
    """See :func:`checked`. A class without test images passes: its recall is unknown, the others' is not."""
    if not train:
        raise DataError(f"{place} holds no training image.", cure="Put at least one image into every class.")
    present = {record.label for record in train}
    empty = [name for label, name in enumerate(classes) if label not in present]
    if empty:
        raise DataError(
            f"Class '{empty[0]}' in {place} has no training image.", cure="Add images to it or remove the class."
        )
    if not test:
        raise DataError(f"{place} holds no test image.", cure="Add test images: the model is evaluated on them.")


def check_options(source: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse an option that ``source`` does not know.

    Raises:
        DataError: an unknown option.
    """
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        cure = f"It knows: {', '.join(allowed)}." if allowed else "It has no options: leave data.options out."
        raise DataError(f"Data source '{source}' has no option '{unknown[0]}'.", cure=cure)
