"""The digest stands for the data: equal for equal data, another for any difference; and the facts of inspect."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace

import pytest
from PIL import Image
from raises import raises_naming

from fedvit.data.manifest import build_manifest, inspect
from fedvit.data.records import Record
from fedvit.errors import DataError


def png(shade: int, width: int = 8, height: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (shade, shade, shade)).save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Memory:
    """A data set in memory."""

    train: tuple[Record, ...]
    test: tuple[Record, ...]
    files: dict[str, bytes]
    name: str = "memory"
    classes: tuple[str, ...] = ("a", "b")

    def read(self, record: Record) -> bytes:
        return self.files[record.key]


@pytest.fixture
def source() -> Memory:
    train = (Record("t/0", 0, "u0"), Record("t/1", 1, "u0"), Record("t/2", 1, "u1"))
    test = (Record("e/0", 0), Record("e/1", 1))
    keys = [record.key for record in train + test]
    return Memory(train, test, {key: png(i, width=8 + i) for i, key in enumerate(keys)})


def test_counts(source: Memory) -> None:
    manifest = build_manifest(source)
    assert (manifest.num_train, manifest.num_test) == (3, 2)
    assert (manifest.train_counts, manifest.test_counts) == ((1, 2), (1, 1))
    assert manifest.duplicates == 0
    assert len(bytes.fromhex(manifest.digest)) == 32


def test_the_digest_ignores_the_order_of_records(source: Memory) -> None:
    turned = replace(source, train=source.train[::-1], test=source.test[::-1])
    assert build_manifest(turned).digest == build_manifest(source).digest


def test_any_difference_changes_the_digest(source: Memory) -> None:
    first, *rest = source.train
    variants = [
        replace(source, train=tuple(rest)),
        replace(source, train=(replace(first, label=1), *rest)),
        replace(source, train=(replace(first, unit="u1"), *rest)),
        replace(source, train=(replace(first, unit=None), *rest)),
        replace(source, train=(replace(first, key="t/x"), *rest), files={**source.files, "t/x": source.files["t/0"]}),
        replace(source, train=tuple(rest), test=(*source.test, first)),
        replace(source, files={**source.files, "t/0": png(77)}),
    ]
    digests = {build_manifest(variant).digest for variant in [source, *variants]}
    assert len(digests) == 1 + len(variants)


def test_separators_inside_names_cannot_forge_a_record(source: Memory) -> None:
    files = {"a\n": png(1), "a": png(1)}
    one = replace(source, train=(Record("a", 0, '", "x'),), test=(Record("a\n", 0),), files=files)
    two = replace(source, train=(Record("a", 0, "x"),), test=(Record("a\n", 0),), files=files)
    assert build_manifest(one).digest != build_manifest(two).digest


def test_copies_between_the_splits_are_counted(source: Memory) -> None:
    leaking = replace(source, files={**source.files, "e/0": source.files["t/1"], "t/2": source.files["t/1"]})
    assert build_manifest(leaking).duplicates == 1


def test_inspect_gives_json_facts(source: Memory) -> None:
    facts = inspect(source, ((0, 1), (2,)))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["digest"] == build_manifest(source).digest
    assert facts["train"] == {"a": 1, "b": 2}
    assert facts["image_sizes"]["width"] == {"min": 8, "median": 10.0, "max": 12}
    assert facts["image_sizes"]["height"] == {"min": 6, "median": 6.0, "max": 6}
    assert facts["units"] == {"count": 2, "records_per_unit": {"min": 1, "median": 1.5, "max": 2}}
    assert facts["clients"]["count"] == 2
    assert facts["clients"]["class_counts"] == [[1, 1], [0, 1]]
    # One third of all records is "a": half of the first client's, none of the second's.
    assert facts["clients"]["label_skew"]["max"] == pytest.approx(1 / 3)
    assert facts["clients"]["label_skew"]["mean"] == pytest.approx((1 / 6 + 1 / 3) / 2)


def test_inspect_without_units(source: Memory) -> None:
    plain = replace(source, train=tuple(replace(record, unit=None) for record in source.train))
    assert inspect(plain, ((0, 1, 2),))["units"] is None


def test_inspect_names_an_unreadable_image(source: Memory) -> None:
    with raises_naming(DataError, "e/1", "memory"):
        inspect(replace(source, files={**source.files, "e/1": b"no image"}), ((0, 1, 2),))
