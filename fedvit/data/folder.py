"""Image folders: one folder per class, in a training and a test split or directly below the root."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedvit.config import DataConfig
from fedvit.data.layout import class_folders, find_layout
from fedvit.data.records import Record, TreeSource, check_options, checked
from fedvit.data.skipped import unread_images
from fedvit.data.trees import FileTree, images_below, open_tree
from fedvit.errors import DataError

DEFAULT_TEST_FRACTION = 0.2


def open_folder(config: DataConfig) -> TreeSource:
    """``path/train/<class>/*`` and ``path/test/<class>/*``, or ``path/<class>/*``, which is split here.

    See :mod:`fedvit.data.layout` for what the folders may be called and where they may lie. The keys of the records
    are the same for every such layout. Without a test folder, option ``test_fraction`` of each class is held out, by
    the order of the SHA-256 of the keys.

    Raises:
        DataError: the path is missing or empty, its layout is not clear, or a class has no image.
    """
    check_options("folder", config.options, ["test_fraction"])
    tree = open_tree(required_path(config))
    fraction, layout = test_fraction(config), find_layout(tree)
    classes = class_folders(tree, layout.train)
    for name in classes:
        _check_images(tree, f"{layout.train}{name}/", f"Class '{name}' in {tree} has no training image")
    if layout.test is None:
        train, test = hold_out(class_records(tree, layout.root, classes), classes, fraction)
        return checked(TreeSource("folder", classes, train, test, tree, (("", layout.root),)), tree)
    check_known(class_folders(tree, layout.test), classes, tree)
    _check_images(tree, layout.test, f"{tree} holds no test image")
    folders = (("train/", layout.train), (f"{layout.test_split}/", layout.test))
    train, test = (class_records(tree, place, classes, start) for start, place in folders)
    return checked(TreeSource("folder", classes, train, test, tree, folders), tree)


def _check_images(tree: FileTree, folder: str, fault: str) -> None:
    if not images_below(tree, folder):
        raise DataError(f"{fault}{unread_images(tree, folder)}.", cure=f"Add images to {folder} or remove the folder.")


def required_path(config: DataConfig) -> Path:
    """The configured path; raises DataError if there is none."""
    if config.path is None:
        raise DataError(f"Data source '{config.source}' needs a path.", cure="Set data.path to a folder or a zip.")
    return config.path


def test_fraction(config: DataConfig) -> float:
    """Option ``test_fraction``; raises DataError if it is not a number between 0 and 1."""
    value = config.options.get("test_fraction", DEFAULT_TEST_FRACTION)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        cure = "Set it to a number between 0 and 1, such as 0.2."
        raise DataError(f"data.options.test_fraction is {value!r}.", cure=cure)
    return float(value)


def class_records(tree: FileTree, parent: str, classes: Sequence[str], start: str = "") -> tuple[Record, ...]:
    """The images of every class folder in ``parent``, sorted by key; in the keys ``start`` replaces ``parent``."""
    labels = {name: label for label, name in enumerate(classes)}
    keys = (name.removeprefix(parent) for name in images_below(tree, parent))
    folders = ((key, key.split("/", 1)[0]) for key in keys if "/" in key)
    return tuple(Record(start + key, labels[folder]) for key, folder in folders if folder in labels)


def check_known(test_classes: Iterable[str], classes: Sequence[str], place: object) -> None:
    """Raise DataError for the first test class without training images."""
    if unknown := sorted(set(test_classes) - set(classes)):
        raise DataError(
            f"Class '{unknown[0]}' in {place} has test images but is unknown to training.",
            cure="Add training images of it or remove it from the test images.",
        )


def hold_out(
    records: Sequence[Record], classes: Sequence[str], fraction: float
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Split ``records`` into (train, test), class by class; every class keeps at least one image on either side.

    Raises:
        DataError: a class has a single image.
    """
    by_label: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_label[record.label].append(record)
    held_out: set[str] = set()
    for label, members in by_label.items():
        if len(members) < 2:
            raise DataError(
                f"Class '{classes[label]}' has a single image, too few to hold one out for testing.",
                cure="Add images to it, or provide a test folder.",
            )
        members.sort(key=lambda record: hashlib.sha256(record.key.encode()).digest())
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held_out.update(record.key for record in members[:count])
    train = tuple(record for record in records if record.key not in held_out)
    return train, tuple(record for record in records if record.key in held_out)
