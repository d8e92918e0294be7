"""Data sources by name: opens the data set that ``data.source`` names."""

from __future__ import annotations

from collections.abc import Callable

from fedvit.config import DataConfig
from fedvit.data.folder import open_folder
from fedvit.data.gtsrb import open_gtsrb
from fedvit.data.import_path import open_import_path
from fedvit.data.records import ImageSource
from fedvit.data.traffic_lights import open_traffic_lights
from fedvit.errors import DataError

_OPENERS: dict[str, Callable[[DataConfig], ImageSource]] = {
    "traffic-lights": open_traffic_lights,
    "folder": open_folder,
    "gtsrb": open_gtsrb,
}


def open_source(config: DataConfig) -> ImageSource:
    """The data set that ``config`` names; images are not read yet.

    Raises:
        DataError: the source is unknown, or missing, empty, corrupt, or lacks a class.
    """
    if opener := _OPENERS.get(config.source):
        return opener(config)
    if "." in config.source:
        return open_import_path(config)
    cure = f"Use one of: {', '.join(_OPENERS)}, or an import path such as torchvision.datasets.CIFAR10."
    raise DataError(f"There is no data source '{config.source}'.", cure=cure)
