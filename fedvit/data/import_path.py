"""Data set classes in torchvision's style, by import path. The class is imported and called, so it must be trusted."""

from __future__ import annotations

import importlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fedvit.config import DataConfig
from fedvit.data.folder import check_known, hold_out, test_fraction
from fedvit.data.records import Record, checked
from fedvit.errors import DataError
from fedvit.wire.images import to_rgb

_SPLITS = ("train", "test")
# The modes that PNG keeps without loss and the decoder reads.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


class _Dataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


@dataclass(slots=True)
class ImportedSource:
    """A data set object read by index. It is pickled as name and arguments, and built again after unpickling."""

    name: str
    arguments: tuple[Mapping[str, Any], ...]
    """Constructor arguments for (train, test), or for a single data set that is split here."""
    classes: tuple[str, ...] = ()
    train: tuple[Record, ...] = ()
    test: tuple[Record, ...] = ()
    _built: dict[int, _Dataset] = field(default_factory=dict, compare=False, repr=False)

    def read(self, record: Record) -> bytes:
        split, index = record.key.split("/")
        part = _SPLITS.index(split) if len(self.arguments) == len(_SPLITS) else 0
        try:
            image, _ = self.dataset(part)[int(index)]
        except Exception as error:  # a foreign class may raise anything
            message = f"{self.name} cannot read {record.key}: {error}."
            raise DataError(message, cure="Fetch the data set again.") from error
        return _png(image, f"{self.name} {record.key}")

    def dataset(self, part: int) -> _Dataset:
        """The data set object of one constructor call, built once per process."""
        if part not in self._built:
            self._built[part] = _construct(self.name, self.arguments[part])
        return self._built[part]

    def __getstate__(self) -> tuple[Any, ...]:
        return (self.name, self.arguments, self.classes, self.train, self.test)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.classes, self.train, self.test = state
        self._built = {}


def open_import_path(config: DataConfig) -> ImportedSource:
    """The class ``config.source``, called with ``root=path`` and ``train=`` or ``split=`` if it has these parameters.

    ``config.options`` are passed on. A data set without ``train`` and ``split`` is split here by option
    ``test_fraction``.

    Raises:
        DataError: it cannot be imported or built, or has no labelled images.
    """
    calls = _calls(config)
    source = ImportedSource(config.source, calls)
    labels = [_labels(source.dataset(part), config.source) for part in range(len(calls))]
    source.classes, index_of = _classes(source.dataset(0), labels[0])
    check_known((str(label) for label in set(labels[-1]) - set(index_of)), (), config.source)
    records = [
        tuple(Record(f"{split}/{i}", index_of[label]) for i, label in enumerate(part))
        for split, part in zip(_SPLITS, labels, strict=False)
    ]
    if len(records) == 1:
        source.train, source.test = hold_out(records[0], source.classes, test_fraction(config))
    else:
        source.train, source.test = records
    return checked(source, config.source)


def _calls(config: DataConfig) -> tuple[Mapping[str, Any], ...]:
    accepted = inspect.signature(_load(config.source)).parameters
    arguments: dict[str, Any] = dict(config.options)
    if "root" in accepted and config.path is not None:
        arguments.setdefault("root", str(config.path))
    if "train" in accepted:
        return {**arguments, "train": True}, {**arguments, "train": False}
    if "split" in accepted:
        return {**arguments, "split": "train"}, {**arguments, "split": "test"}
    arguments.pop("test_fraction", None)
    return (arguments,)


def _load(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    try:
        loaded = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"Data source '{name}' cannot be imported: {error}.",
            cure="Install its package, or correct the import path (such as torchvision.datasets.CIFAR10).",
        ) from None
    if not isinstance(loaded, type):
        raise DataError(f"Data source '{name}' is no class.", cure="Name a data set class.")
    return loaded


def _construct(name: str, arguments: Mapping[str, Any]) -> _Dataset:
    try:
        dataset: _Dataset = _load(name)(**arguments)
        len(dataset)
    except DataError:
        raise
    except Exception as error:  # a foreign class may raise anything
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"{name}({shown}) failed: {reason}.",
            cure="Set data.path and data.options as the class wants them (many take download: true).",
        ) from error
    return dataset


def _labels(dataset: _Dataset, name: str) -> list[int]:
    targets = getattr(dataset, "targets", None)
    try:
        # Reading every image for its label takes minutes with a large data set.
        if targets is None or len(targets) != len(dataset):
            targets = [dataset[i][1] for i in range(len(dataset))]
        return [int(label) for label in targets]
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{name} does not yield (image, whole-number label) pairs: {error}.", cure="Name a classification data set."
        ) from None


def _classes(dataset: _Dataset, labels: Sequence[int]) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names, and the index of each label in them."""
    values = sorted(set(labels))
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and values and values[0] >= 0 and values[-1] < len(names):
        return tuple(str(name) for name in names), {i: i for i in range(len(names))}
    return tuple(str(label) for label in values), {label: i for i, label in enumerate(values)}


def _png(image: Any, place: str) -> bytes:
    try:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        buffer = io.BytesIO()
        # Never a mode that the decoder would read in another way, such as floating-point values.
        (picture if picture.mode in _PNG_MODES else to_rgb(picture)).save(buffer, format="PNG")
    except DataError as error:
        raise DataError(f"{place}: {error.message}", cure=error.cure) from None
    except (TypeError, ValueError, OSError) as error:
        raise DataError(
            f"{place} is no image but a {type(image).__name__}: {error}.",
            cure="Leave transforms out: the data set must yield PIL images or arrays [H, W] or [H, W, 3].",
        ) from None
    return buffer.getvalue()
