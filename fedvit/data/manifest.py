"""Manifest (content digest) and statistics of a data set and its partition."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedvit.data.records import ImageSource, Record
from fedvit.data.skipped import skipped_files
from fedvit.errors import DataError
from fedvit.wire.images import FORMATS

_SIZE_SAMPLE = 256
_MOST_GROUPS = 20

_Hashes = dict[str, list[str]]
"""SHA-256, hex, of the image files of each split, in the order of its records."""


@dataclass(frozen=True, slots=True)
class DataManifest:
    """Identity and counts of a data set. Counts are in the order of ``classes``.

    ``digest`` is the SHA-256, hex, over the sorted (split, key, label, unit, SHA-256 of the image file) of all records.
    ``duplicates`` is the number of test images that equal a training image byte for byte; they inflate test accuracy.
    """

    name: str
    classes: tuple[str, ...]
    num_train: int
    num_test: int
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    digest: str
    duplicates: int


def build_manifest(source: ImageSource) -> DataManifest:
    """Read every image file once and describe the data set.

    Raises:
        DataError: a file cannot be read.
    """
    return _manifest(source, _file_hashes(source))


def _file_hashes(source: ImageSource) -> _Hashes:
    records = {"train": source.train, "test": source.test}
    return {split: [hashlib.sha256(source.read(r)).hexdigest() for r in each] for split, each in records.items()}


def _manifest(source: ImageSource, hashes: _Hashes) -> DataManifest:
    # JSON, so that different records never give the same line.
    lines = [
        json.dumps([split, r.key, r.label, r.unit, content])
        for split, records in (("train", source.train), ("test", source.test))
        for r, content in zip(records, hashes[split], strict=True)
    ]
    train_set = set(hashes["train"])
    return DataManifest(
        name=source.name,
        classes=source.classes,
        num_train=len(source.train),
        num_test=len(source.test),
        train_counts=class_counts(source.train, len(source.classes)),
        test_counts=class_counts(source.test, len(source.classes)),
        digest=hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(),
        duplicates=sum(digest in train_set for digest in hashes["test"]),
    )


def class_counts(records: Sequence[Record], num_classes: int) -> tuple[int, ...]:
    """How many records each class has."""
    counts = Counter(record.label for record in records)
    return tuple(counts[label] for label in range(num_classes))


def inspect(source: ImageSource, parts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Statistics of a data set and its partition, as JSON types. Image sizes are in pixels, of an even sample.

    Raises:
        DataError: an image cannot be read or decoded; the message names its key.
    """
    hashes = _file_hashes(source)
    facts = asdict(_manifest(source, hashes))
    train_counts, test_counts = facts.pop("train_counts"), facts.pop("test_counts")
    return {
        **facts,
        "classes": list(source.classes),
        "train": dict(zip(source.classes, train_counts, strict=True)),
        "test": dict(zip(source.classes, test_counts, strict=True)),
        "image_sizes": _image_sizes(source),
        "units": _units(source.train),
        "clients": _clients(source, parts),
        **_duplicates_within(source, hashes["train"]),
        "skipped": [asdict(each) | {"examples": list(each.examples)} for each in skipped_files(source)],
    }


def _duplicates_within(source: ImageSource, hashes: Sequence[str]) -> dict[str, Any]:
    """Training images that equal an earlier one byte for byte, and the first groups of equal ones."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record, content in zip(source.train, hashes, strict=True):
        groups[content].append(record)
    equal = [group for group in groups.values() if len(group) > 1]
    return {
        "duplicates_within_train": sum(len(group) - 1 for group in equal),
        "equal_training_images": [
            {
                "images": [record.key for record in group],
                "classes": sorted({source.classes[record.label] for record in group}),
            }
            for group in equal[:_MOST_GROUPS]
        ],
    }


def _image_sizes(source: ImageSource) -> dict[str, Any]:
    records = source.train + source.test
    picks = np.unique(np.linspace(0, len(records) - 1, _SIZE_SAMPLE).astype(np.int64))
    sizes = [_size(source, records[i]) for i in picks]
    return {"sampled": len(sizes), "width": _spread([w for w, _ in sizes]), "height": _spread([h for _, h in sizes])}


def _size(source: ImageSource, record: Record) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(source.read(record)), formats=FORMATS) as image:
            return image.size
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        message = f"{record.key} of {source.name} is no readable image: {type(error).__name__}."
        raise DataError(message, cure="Replace or remove the file.") from None


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "median": float(median(values)), "max": max(values)}


def _units(records: Sequence[Record]) -> dict[str, Any] | None:
    sizes = Counter(record.unit for record in records if record.unit is not None)
    return {"count": len(sizes), "records_per_unit": _spread(list(sizes.values()))} if sizes else None


def _clients(source: ImageSource, parts: Sequence[Sequence[int]]) -> dict[str, Any]:
    num_classes = len(source.classes)
    counts = [class_counts([source.train[i] for i in part], num_classes) for part in parts]
    skews = [_label_skew(np.asarray(row), np.asarray(counts).sum(axis=0)) for row in counts]
    return {
        "count": len(parts),
        "examples": _spread([len(part) for part in parts]),
        "label_skew": {"mean": float(np.mean(skews)), "max": float(np.max(skews))},
        "class_counts": [list(row) for row in counts],
    }


def _label_skew(counts: np.ndarray[Any, Any], overall: np.ndarray[Any, Any]) -> float:
    """Total variation distance between a client's label distribution and everybody's: 0 is the same, 1 disjoint."""
    return float(np.abs(counts / counts.sum() - overall / overall.sum()).sum() / 2)
