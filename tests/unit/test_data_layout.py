"""Layouts of image folders: one data set under all usual names, and refusals of what could be read in two ways."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raises import raises_naming

from edge_runtime.training.records import OwnRecords, count_images
from fedvit.config import DataConfig, PartitionConfig
from fedvit.data.manifest import build_manifest
from fedvit.data.partition import VirtualFleet
from fedvit.data.records import ImageSource, check_images, load_images
from fedvit.data.sources import open_source
from fedvit.errors import DataError
from fedvit.wire.images import MAX_IMAGE_BYTES

Files = Mapping[str, bytes]
CLASSES = ("coat", "shoe")


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def images(folder: str = "", count: int = 4, first: int = 0) -> dict[str, bytes]:
    return {f"{folder}{name}/{i}.png": png(first + 10 * c + i) for c, name in enumerate(CLASSES) for i in range(count)}


def splits(train: str = "train/", test: str = "test/") -> dict[str, bytes]:
    return images(train) | images(test, 2, first=100)


def written(root: Path, files: Files) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def zipped(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def config(path: Path) -> DataConfig:
    parts = PartitionConfig(scheme="iid", clients=2, min_examples=2)
    return DataConfig(source="folder", path=path, image_size=16, partition=parts)


def read(tmp_path: Path, files: Files) -> ImageSource:
    return open_source(config(written(tmp_path / "data", files)))


def test_a_folder_a_zip_with_a_parent_folder_and_other_names_are_one_data_set(tmp_path: Path) -> None:
    places = [
        written(tmp_path / "plain", splits()),
        zipped(tmp_path / "parent.zip", splits("fashion/train/", "fashion/test/")),
        written(tmp_path / "names", splits("Training/", "Testing/")),
    ]
    fleets = [VirtualFleet.open(config(place)) for place in places]
    assert len({build_manifest(fleet.source).digest for fleet in fleets}) == 1
    assert len({fleet.parts_digest() for fleet in fleets}) == 1
    assert len({tuple(fleet.source.read(record) for record in fleet.source.train) for fleet in fleets}) == 1
    assert [(record.key, record.label) for record in fleets[2].source.test[:2]] == [
        ("test/coat/0.png", 0),
        ("test/coat/1.png", 0),
    ]


@pytest.mark.parametrize(
    ("train", "test", "split"),
    [
        ("Train/", "Test/", "test"),
        ("TRAINING/", "TESTING/", "test"),
        ("training_set/", "test_set/", "test"),
        ("train/", "valid/", "val"),
        ("train/", "Validation/", "val"),
        ("TrainImages/", "test-images/", "test"),
        ("train2017/", "val2017/", "val"),
        ("seg_train/seg_train/", "seg_test/seg_test/", "test"),
        ("a/b/Training/Images/", "a/b/Test/Images/", "test"),
        ("fruits_train/", "fruits_test/", "test"),
    ],
)
def test_splits_are_known_by_their_usual_names(tmp_path: Path, train: str, test: str, split: str) -> None:
    source = read(tmp_path, splits(train, test))
    assert source.classes == CLASSES
    assert [record.key for record in source.train[:2]] == ["train/coat/0.png", "train/coat/1.png"]
    assert [record.key for record in source.test] == [f"{split}/{c}/{i}.png" for c in CLASSES for i in range(2)]
    assert source.read(source.test[0]) == png(100)


def test_class_folders_may_lie_in_parent_folders(tmp_path: Path) -> None:
    nested, flat = read(tmp_path / "a", images("archive/pictures/")), read(tmp_path / "b", images())
    assert nested.classes == CLASSES
    assert (nested.train, nested.test) == (flat.train, flat.test)
    assert build_manifest(nested).digest == build_manifest(flat).digest


def test_labelled_validation_images_are_used_where_test_images_have_no_labels(tmp_path: Path) -> None:
    unlabelled = {f"test/{i}.png": png(i) for i in range(3)}
    source = read(tmp_path, splits("train/", "val/") | unlabelled)
    assert {record.key.split("/")[0] for record in source.test} == {"val"}


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (images("only/", count=4) | {"only/test/coat/1.png": png(1)}, ["'test'"]),
        ({f"parent/coat/{i}.png": png(i) for i in range(4)}, ["'coat'", "single class"]),
        ({f"{s}/coat/{i}.png": png(i) for s in ("train", "test") for i in range(4)}, ["'coat'", "single class"]),
        (splits() | images("Training/"), ["train", "Training"]),
        (splits() | {"train/Validation/0.png": png(7)}, ["'Validation'"]),
        (images("one_train/") | images("one_test/") | images("two_train/") | images("two_test/"), ["one_train"]),
        ({f"train/{i}.png": png(i) for i in range(3)} | {"test/0.png": png(9)}, ["3 images and no class folder"]),
        (images() | {"train/0.png": png(0)}, ["train", "neither test nor val"]),
    ],
    ids=["class test", "one class", "one class in splits", "two trainings", "class in train", "pairs", "flat", "mixed"],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path: Path, files: Files, names: list[str]) -> None:
    with raises_naming(DataError, *names) as caught:
        read(tmp_path, files)
    assert caught.value.cure


def test_a_class_may_have_a_longer_name_with_the_word_of_a_split(tmp_path: Path) -> None:
    files = {f"{name}/{i}.png": png(i) for name in ("test strip", "train station") for i in range(3)}
    assert read(tmp_path, files).classes == ("test strip", "train station")


@pytest.mark.parametrize("parent", ["", "Training/", "trips/", "trips/training_set/"])
def test_a_vehicle_finds_its_own_images_under_the_same_names(tmp_path: Path, parent: str) -> None:
    path = zipped(
        tmp_path / "own.zip", images(parent) | ({"trips/test_set/coat/9.png": png(9)} if "_" in parent else {})
    )
    own = OwnRecords.open(path, ("bag", *CLASSES))
    assert count_images(path) == len(own.records("vehicle-1")) == 8
    assert {record.label for record in own.records("vehicle-1")} == {1, 2}
    assert own.source.read(own.source.train[0]) == png(0)


def test_a_vehicle_with_one_class_and_a_class_named_train_are_read(tmp_path: Path) -> None:
    one = written(tmp_path / "one", {"coat/2026/0.png": png(0)})
    assert [record.label for record in OwnRecords.open(one, CLASSES).records("")] == [0]
    named = written(tmp_path / "named", {"train/0.png": png(0), "car/0.png": png(1)})
    assert count_images(named) == len(OwnRecords.open(named, ("car", "train")).records("")) == 2


@pytest.mark.parametrize(
    ("source", "files", "named"),
    [
        ("traffic-lights", splits(), "data.source=folder"),
        ("traffic-lights", {"x/Final_Training/Images/00001/0.ppm": b""}, "data.source=gtsrb"),
        ("gtsrb", images("animals/"), "data.source=folder"),
        ("folder", {"Final_Training/Images/00001/0.ppm": b"", "Final_Test/Images/0.ppm": b""}, "data.source=gtsrb"),
        ("gtsrb", {"dataset_train/red/0.jpg": b""}, "data.source=traffic-lights"),
    ],
)
def test_data_of_another_source_name_their_source(tmp_path: Path, source: str, files: Files, named: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(source=source, path=written(tmp_path / "data", files)))
    assert named in (caught.value.cure or "")


def test_images_are_checked_without_holding_all_of_them(tmp_path: Path) -> None:
    source = read(tmp_path, images(count=40))
    tracemalloc.start()
    check_images(source, source.train, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(source.train) * 256 * 256 * 3 / 2
    key = source.train[40].key
    (tmp_path / "data" / key).write_bytes(b"broken")
    with raises_naming(DataError, key):
        check_images(source, source.train, 16)


def test_training_images_may_be_larger_than_what_a_server_takes(tmp_path: Path) -> None:
    files = images()
    files["coat/0.png"] += bytes(MAX_IMAGE_BYTES)
    source = read(tmp_path, files)
    assert load_images(source, (*source.train, *source.test), 16).shape == (8, 16, 16, 3)
