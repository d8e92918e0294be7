"""What ``fedvit data inspect`` tells about a data set and how it is dealt out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedvit.data.manifest import build_manifest, class_counts
from fedvit.data.records import ImageSource, Record
from fedvit.errors import DataError
from fedvit.wire.images import FORMATS

_SIZE_SAMPLE = 256


def inspect(source: ImageSource, parts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Facts of a data set and its partition, JSON types only. Image sizes are in pixels, from an even sample.

    Raises:
        DataError: an image cannot be read or decoded; the message names its key.
    """
    manifest = build_manifest(source)
    facts = asdict(manifest)
    train_counts, test_counts = facts.pop("train_counts"), facts.pop("test_counts")
    return {
        **facts,
        "classes": list(source.classes),
        "train": dict(zip(source.classes, train_counts, strict=True)),
        "test": dict(zip(source.classes, test_counts, strict=True)),
        "image_sizes": _image_sizes(source),
        "units": _units(source.train),
        "clients": _clients(source, parts),
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
        raise DataError(
            f"{record.key} of {source.name} is no readable image: {type(error).__name__}.",
            cure="Replace or remove the file.",
        ) from None


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "median": float(median(values)), "max": max(values)}


def _units(records: Sequence[Record]) -> dict[str, Any] | None:
    sizes: dict[str, int] = {}
    for record in records:
        if record.unit is not None:
            sizes[record.unit] = sizes.get(record.unit, 0) + 1
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
