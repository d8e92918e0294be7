"""Image folders: one folder per class, below ``train`` and ``test``, or directly below the root."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedvit.config import DataConfig
from fedvit.data.records import Record, TreeSource, check_options, checked
from fedvit.data.trees import FileTree, open_tree
from fedvit.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp")
TEST_FOLDERS = ("test", "val")
DEFAULT_TEST_FRACTION = 0.2


def open_folder(config: DataConfig) -> TreeSource:
    """``path/train/<class>/*`` and ``path/test/<class>/*`` (or ``val``), or ``path/<class>/*``, which is split here.

    Without a test folder, option ``test_fraction`` of each class is held out, by the order of the SHA-256 of the keys.

    Raises:
        DataError: the path is missing, empty, or a class has no image.
    """
    check_options("folder", config.options, ["test_fraction"])
    tree = open_tree(required_path(config))
    if "train/" in tree.names:
        return _open_split_folder(tree)
    fraction, classes = test_fraction(config), subfolders(tree, "")
    if not classes:
        cure = "Arrange it as train/<class>/<image> or <class>/<image>."
        raise DataError(f"{tree} holds no class folder.", cure=cure)
    for name in classes:
        if not images_below(tree, f"{name}/"):
            raise DataError(f"Class '{name}' in {tree} has no image.", cure="Add images to it or remove the folder.")
    train, test = hold_out(class_records(tree, "", classes), classes, fraction)
    return checked(TreeSource("folder", classes, train, test, tree), tree)


def _open_split_folder(tree: FileTree) -> TreeSource:
    test_folder = next((name for name in TEST_FOLDERS if f"{name}/" in tree.names), None)
    if test_folder is None:
        raise DataError(f"{tree} has a folder train but neither test nor val.", cure="Add test/<class>/<image>.")
    classes = subfolders(tree, "train/")
    check_known(subfolders(tree, f"{test_folder}/"), classes, tree)
    train, test = (class_records(tree, f"{folder}/", classes) for folder in ("train", test_folder))
    return checked(TreeSource("folder", classes, train, test, tree), tree)


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


def subfolders(tree: FileTree, parent: str) -> tuple[str, ...]:
    """Names of the folders directly below ``parent``, sorted."""
    below = (name[len(parent) : -1] for name in tree.names if name.endswith("/") and name.startswith(parent))
    return tuple(sorted(name for name in below if name and "/" not in name))


def images_below(tree: FileTree, parent: str) -> list[str]:
    """Names of the images at any depth below ``parent``, sorted."""
    return sorted(n for n in tree.names if n.startswith(parent) and n.lower().endswith(IMAGE_SUFFIXES))


def class_records(tree: FileTree, parent: str, classes: Sequence[str], prefix: str = "") -> tuple[Record, ...]:
    """The images of every class folder below ``prefix + parent``, sorted by key; keys do not contain ``prefix``."""
    labels = {name: label for label, name in enumerate(classes)}
    keys = (name.removeprefix(prefix) for name in images_below(tree, prefix + parent))
    folders = ((key, key.removeprefix(parent).split("/", 1)[0]) for key in keys)
    return tuple(Record(key, labels[folder]) for key, folder in folders if folder in labels)


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
