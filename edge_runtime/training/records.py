"""Images on a vehicle's disk: the records that it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvit.data.folder import class_records
from fedvit.data.layout import find_training_folder
from fedvit.data.records import Record, TreeSource
from fedvit.data.skipped import unread_images
from fedvit.data.trees import images_below, open_tree, subfolders
from fedvit.errors import DataError


@dataclass(frozen=True, slots=True)
class OwnRecords:
    """One vehicle's data set; implements :class:`fedvit.clients.host.ClientRecords`."""

    source: TreeSource

    @classmethod
    def open(cls, path: Path, classes: Sequence[str]) -> OwnRecords:
        """The images of the fleet's ``classes``, which define the labels; a vehicle need not have all classes.

        Raises:
            DataError: there is no image, or a folder is not named like one of the classes.
        """
        tree = open_tree(path)
        parent = find_training_folder(tree, tuple(classes))
        if unknown := sorted(set(subfolders(tree, parent)) - set(classes)):
            raise DataError(f"{path} has a folder {unknown[0]!r}.", cure=f"The fleet's classes: {', '.join(classes)}.")
        train = class_records(tree, parent, classes, parent)
        if not train:
            message = f"{path} holds no image{unread_images(tree, parent)}."
            raise DataError(message, cure="Put images into folders named like the fleet's classes.")
        return cls(TreeSource("own", tuple(classes), train, (), tree))

    def records(self, client_id: str) -> tuple[Record, ...]:
        """All records: there is one client."""
        return self.source.train


def count_images(path: Path) -> int:
    """The number of images in folders of any name; raises DataError where there is no such folder."""
    tree = open_tree(path)
    parent = find_training_folder(tree)
    return sum(len(images_below(tree, f"{parent}{name}/")) for name in subfolders(tree, parent))
