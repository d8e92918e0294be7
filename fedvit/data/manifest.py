"""A data set in one digest: what was trained on can be named, compared and proved unchanged."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedvit.data.records import ImageSource, Record


@dataclass(frozen=True, slots=True)
class DataManifest:
    """The facts of one data set. Counts are in the order of ``classes``.

    ``digest`` is the SHA-256, hex, over the sorted (split, key, label, unit, SHA-256 of the image file) of all records.
    ``duplicates`` counts test images whose exact bytes are also a training image: they flatter the test accuracy.
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
    train_hashes = [_hash(source, record) for record in source.train]
    test_hashes = [_hash(source, record) for record in source.test]
    lines = _lines("train", source.train, train_hashes) + _lines("test", source.test, test_hashes)
    seen_in_training = set(train_hashes)
    return DataManifest(
        name=source.name,
        classes=source.classes,
        num_train=len(source.train),
        num_test=len(source.test),
        train_counts=class_counts(source.train, len(source.classes)),
        test_counts=class_counts(source.test, len(source.classes)),
        digest=hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(),
        duplicates=sum(digest in seen_in_training for digest in test_hashes),
    )


def class_counts(records: Sequence[Record], num_classes: int) -> tuple[int, ...]:
    """How many records each class has."""
    counts = Counter(record.label for record in records)
    return tuple(counts[label] for label in range(num_classes))


def _hash(source: ImageSource, record: Record) -> str:
    return hashlib.sha256(source.read(record)).hexdigest()


def _lines(split: str, records: Sequence[Record], hashes: Sequence[str]) -> list[str]:
    # JSON, so that no two different records write the same line.
    return [json.dumps([split, r.key, r.label, r.unit, digest]) for r, digest in zip(records, hashes, strict=True)]
