"""Layout of image folders: the root of a data set inside a tree, its splits by their usual names, its class folders.

A tree often begins with a parent folder, and its splits have many spellings: ``Train``, ``Training``, ``training_set``,
``train2017`` and ``fruits_train`` are all a training split. What could be read in two ways is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fedvit.data.trees import FileTree, images_below, images_in, prefix_before, subfolders
from fedvit.errors import DataError

Split = Literal["train", "test", "val"]
_SPELLINGS: dict[Split, str] = {
    "train": "train training trainset trainingset traindata trainval",
    "test": "test testing testset testingset testdata",
    "val": "val valid validation valset validset validationset",
}
_SPLIT_WORDS: dict[str, Split] = {word: split for split, words in _SPELLINGS.items() for word in words.split()}
_FILLERS = "set data dataset folder split final image images img imgs photo photos picture pictures"
_FILLER_WORDS = frozenset(_FILLERS.split())
_WORD = re.compile(r"[^\W\d_]+")
_GTSRB_ZIP = re.compile(r"GTSRB[^/]*\.zip")
_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of a data set in a tree; their names end with ``/``, or are empty for the top of the tree.

    Attributes:
        root: holds the splits, or the classes if there are no splits.
        train: holds the class folders of the training images.
        test: holds those of the test images; None if there are no splits.
        test_split: what ``test`` is called: "test" or "val".
    """

    root: str
    train: str
    test: str | None = None
    test_split: Split = "test"


def find_layout(tree: FileTree) -> Layout:
    """The layout of ``tree``.

    Raises:
        DataError: there are several training or test splits, one without the other, or a class is named like a split.
    """
    root = find_root(tree)
    splits = {name: named for name in subfolders(tree, root) if (named := _split_name(name)) is not None}
    pairs = [
        (a, b)
        for a, train in splits.items()
        for b, test in splits.items()
        if train.split == "train" and test.split != "train" and train.rest == test.rest
    ]
    if not pairs:
        if alone := [name for name in splits if is_named_like_split(name, "train")]:
            raise DataError(
                f"{tree} has a folder {root}{alone[0]} but neither test nor val.",
                cure="Add test/<class>/<image>; or, if it is a class, rename it: it is named like a split.",
            )
        return Layout(root, root)
    _check_single(tree, root, sorted({a for a, _ in pairs}))
    train = _without_wrapping(tree, f"{root}{pairs[0][0]}/", "train")
    candidates: list[tuple[Split, str]] = []
    for split in ("test", "val"):
        names = sorted({b for _, b in pairs if splits[b].split == split})
        if names:
            _check_single(tree, root, names)
            candidates.append((split, _without_wrapping(tree, f"{root}{names[0]}/", split)))
    # Test images of a competition have no labels, and its validation images do.
    test_split, test = next((each for each in candidates if subfolders(tree, each[1])), candidates[0])
    return Layout(root, train, test, test_split)


def find_root(tree: FileTree, classes: tuple[str, ...] = ()) -> str:
    """The topmost folder that holds more than a single parent folder.

    Args:
        classes: names of folders that are classes, whatever they hold.
    """
    root = ""
    while True:
        folders = subfolders(tree, root)
        if len(folders) != 1 or folders[0] in classes or is_named_like_split(folders[0]):
            return root
        below = f"{root}{folders[0]}/"
        if images_in(tree, root) or images_in(tree, below) or not images_below(tree, below):
            return root
        root = below


def find_training_folder(tree: FileTree, classes: tuple[str, ...] = ()) -> str:
    """The folder that holds the class folders to train on, in a tree that need not have a test split.

    Args:
        classes: names of folders that are classes, whatever they hold.

    Raises:
        DataError: there are several training splits.
    """
    root = find_root(tree, classes)
    trains = [
        name
        for name in subfolders(tree, root)
        if is_named_like_split(name, "train") and not images_in(tree, f"{root}{name}/")
    ]
    if not trains:
        return root
    _check_single(tree, root, trains)
    return _without_wrapping(tree, f"{root}{trains[0]}/", "train")


def class_folders(tree: FileTree, parent: str) -> tuple[str, ...]:
    """Names of the class folders in ``parent``, sorted.

    Raises:
        DataError: there is none, or one is named like a split.
    """
    classes = subfolders(tree, parent)
    if not classes:
        beside = len(images_in(tree, parent))
        found = f"{beside} images and no class folder" if beside else "no class folder"
        cure = "Arrange it as train/<class>/<image> and test/<class>/<image>, or as <class>/<image>."
        raise DataError(
            f"{tree} holds {found}{f' in {parent}' if parent else ''}.", cure=other_source(tree, "folder") or cure
        )
    if odd := [name for name in classes if is_named_like_split(name)]:
        raise DataError(
            f"'{odd[0]}' in {tree} would be a class, and is named like a split.",
            cure="Name the splits train and test, side by side; or rename the class.",
        )
    return classes


def is_named_like_split(folder: str, split: Split | None = None) -> bool:
    """Whether a folder's name says that it is a split, any or a certain one, and nothing else."""
    named = _split_name(folder)
    return named is not None and not named.rest and split in (None, named.split)


def other_source(tree: FileTree, source: str) -> str | None:
    """Advice to set ``data.source``, if ``tree`` is laid out like another source than ``source``; None if not."""
    if prefix_before(tree.names, "Final_Training/Images/") is not None or any(map(_GTSRB_ZIP.fullmatch, tree.names)):
        found = "gtsrb"
    elif prefix_before(tree.names, "dataset_train/red/") is not None:
        found = "traffic-lights"
    elif _has_classes(tree):
        found = "folder"
    else:
        return None
    return None if found == source else f"It is laid out for another source: set data.source={found}."


def _has_classes(tree: FileTree) -> bool:
    try:
        train = find_layout(tree).train
    except DataError:
        return False
    return len(subfolders(tree, train)) > 1 and bool(images_below(tree, train))


@dataclass(frozen=True, slots=True)
class _SplitName:
    """A folder's name: the split that it names, and the words that are left."""

    split: Split
    rest: tuple[str, ...]


def _split_name(folder: str) -> _SplitName | None:
    words = [word.lower() for word in _WORD.findall(_CAMEL_CASE.sub(" ", folder))]
    splits = [_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS]
    rest = tuple(word for word in words if word not in _SPLIT_WORDS and word not in _FILLER_WORDS)
    return _SplitName(splits[0], rest) if len(splits) == 1 else None


def _without_wrapping(tree: FileTree, folder: str, split: Split) -> str:
    """``folder``, or the folder of images in it that holds the classes, as in ``Training/Images/<class>``."""
    while len(inner := subfolders(tree, folder)) == 1 and not images_in(tree, folder):
        named, words = _split_name(inner[0]), _WORD.findall(inner[0].lower())
        wraps = named.split == split if named else bool(words) and _FILLER_WORDS.issuperset(words)
        if not wraps:
            break
        folder = f"{folder}{inner[0]}/"
    return folder


def _check_single(tree: FileTree, root: str, names: list[str]) -> None:
    if len(names) > 1:
        raise DataError(
            f"{tree} has several folders for one split: {', '.join(root + name for name in names)}.",
            cure="Name one of them train and one test, or set data.path to one data set.",
        )
