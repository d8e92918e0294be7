"""GTSRB in its official layout: one zip, three zips, a folder; and the real reduced set where it is at hand."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from raises import raises_naming

from fedvit.config import DataConfig, PartitionConfig
from fedvit.data.manifest import build_manifest
from fedvit.data.partition import partition
from fedvit.data.records import ImageSource, Record, load_images
from fedvit.data.sources import open_source
from fedvit.errors import DataError

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
TEST_IMAGES = {"00000.ppm": 14, "00001.ppm": 3, "00002.ppm": 14}


def ppm(red: int, green: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (red, green, 0)).save(buffer, format="PPM")
    return buffer.getvalue()


def csv_text(class_of_file: dict[str, int]) -> str:
    lines = [f"{name};12;10;1;1;9;9;{class_id}" for name, class_id in class_of_file.items()]
    return "\r\n".join([HEADER, *lines]) + "\r\n"


def training_files(classes: tuple[int, ...] = (3, 14), tracks: int = 3, frames: int = 2) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for c in classes:
        names = [f"{t:05d}_{f:05d}.ppm" for t in range(tracks) for f in range(frames)]
        files |= {f"GTSRB/Final_Training/Images/{c:05d}/{n}": ppm(c, i) for i, n in enumerate(names)}
        files[f"GTSRB/Final_Training/Images/{c:05d}/GT-{c:05d}.csv"] = csv_text(dict.fromkeys(names, c)).encode()
    return files


def held_out_files() -> dict[str, bytes]:
    return {f"GTSRB/Final_Test/Images/{name}": ppm(c, 99) for name, c in TEST_IMAGES.items()}


TEST_CSV = {"GTSRB/Final_Test/Images/GT-final_test.csv": csv_text(TEST_IMAGES).encode()}


def whole() -> dict[str, bytes]:
    return training_files() | held_out_files() | TEST_CSV


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def open_gtsrb(path: Path) -> ImageSource:
    return open_source(DataConfig(source="gtsrb", path=path))


def test_classes_tracks_and_test_labels(tmp_path: Path) -> None:
    source = open_gtsrb(write_zip(tmp_path / "mini.zip", whole()))
    assert source.classes == ("00003", "00014")
    assert len(source.train) == 12
    assert source.train[2] == Record("Final_Training/Images/00003/00001_00000.ppm", 0, "00003/00001")
    assert [record.label for record in source.test] == [1, 0, 1]
    assert {record.unit for record in source.test} == {None}
    assert load_images(source, source.test, 16)[:, 0, 0, 0].tolist() == [14, 3, 14]


def test_every_packaging_is_the_same_data_set(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    write_zip(downloads / "GTSRB_Final_Training_Images.zip", training_files())
    unlabelled = {"GTSRB/Final_Test/Images/GT-final_test.test.csv": HEADER.removesuffix(";ClassId").encode()}
    write_zip(downloads / "GTSRB_Final_Test_Images.zip", held_out_files() | unlabelled)
    write_zip(downloads / "GTSRB_Final_Test_GT.zip", {"GT-final_test.csv": csv_text(TEST_IMAGES).encode()})
    alone = tmp_path / "alone"
    alone.mkdir()
    one_up = {"GTSRB/Final_Test/GT-final_test.csv": csv_text(TEST_IMAGES).encode()}
    places = [
        write_zip(tmp_path / "mini.zip", whole()),
        write_folder(tmp_path / "unpacked", whole()),
        tmp_path / "unpacked" / "GTSRB",
        write_folder(tmp_path / "one_up", training_files() | held_out_files() | one_up),
        downloads,
        write_zip(alone / "GTSRB-small.zip", whole()).parent,
    ]
    digests = {build_manifest(open_gtsrb(place)).digest for place in places}
    assert len(digests) == 1


def test_training_without_csv_uses_the_folder_names(tmp_path: Path) -> None:
    files = {name: content for name, content in whole().items() if "/GT-000" not in name}
    source = open_gtsrb(write_zip(tmp_path / "mini.zip", files))
    assert source.classes == ("00003", "00014")
    assert {record.label for record in source.train} == {0, 1}


def test_a_reduced_set_may_list_images_it_does_not_hold(tmp_path: Path) -> None:
    files = whole()
    del files["GTSRB/Final_Test/Images/00001.ppm"], files["GTSRB/Final_Training/Images/00003/00000_00001.ppm"]
    source = open_gtsrb(write_zip(tmp_path / "mini.zip", files))
    assert (len(source.train), len(source.test)) == (11, 2)


def test_tracks_stay_whole_under_the_natural_partition(tmp_path: Path) -> None:
    source = open_gtsrb(write_zip(tmp_path / "mini.zip", whole()))
    parts = partition(source.train, 2, PartitionConfig(scheme="natural", clients=3, min_examples=2))
    owners = [{source.train[i].unit for i in part} for part in parts]
    assert sum(len(units) for units in owners) == 6
    assert len(set().union(*owners)) == 6


CSV_3 = "GTSRB/Final_Training/Images/00003/GT-00003.csv"
CSV_TEST = "GTSRB/Final_Test/Images/GT-final_test.csv"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({CSV_3: csv_text({"00000_00000.ppm": 14}).encode()}, ["00000_00000.ppm", "00014", "00003"]),
        ({CSV_3: b"Filename,ClassId\n00000_00000.ppm,3\n"}, ["Line 2", "GT-00003.csv", "ClassId"]),
        ({CSV_3: b"\xff\xfe\x00"}, ["GT-00003.csv"]),
        ({CSV_TEST: csv_text({**TEST_IMAGES, "00001.ppm": 41}).encode()}, ["'00041'"]),
        ({CSV_TEST: csv_text({"00000.ppm": 14}).encode()}, ["00001.ppm"]),
        ({CSV_TEST: csv_text(TEST_IMAGES).replace(";3", ";stop").encode()}, ["'stop' in line 3"]),
        ({CSV_TEST: None}, ["GT-final_test.csv"]),
        ({"GTSRB/Final_Training/Images/stop/00000_00000.ppm": ppm(1)}, ["'stop'"]),
        ({"GTSRB/Final_Training/Images/00007/": b""}, ["'00007'"]),
        (dict.fromkeys(held_out_files()), ["Final_Test/Images/"]),
        (dict.fromkeys(training_files()), ["Final_Training/Images/"]),
    ],
)
def test_faults_are_named(tmp_path: Path, change: dict[str, bytes | None], names: list[str]) -> None:
    files = {name: content for name, content in (whole() | change).items() if content is not None}
    with raises_naming(DataError, *names) as caught:
        open_gtsrb(write_zip(tmp_path / "mini.zip", files))
    assert caught.value.cure


def test_several_sets_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    write_zip(tmp_path / "GTSRB-32px.zip", whole())
    write_zip(tmp_path / "GTSRB-64px.zip", whole())
    with raises_naming(DataError, "GTSRB-32px.zip", "GTSRB-64px.zip"):
        open_gtsrb(tmp_path)


@pytest.mark.skipif(not os.environ.get("GTSRB_ZIP"), reason="GTSRB_ZIP names no GTSRB zip")
def test_the_real_data_set() -> None:
    source = open_gtsrb(Path(os.environ["GTSRB_ZIP"]))
    manifest = build_manifest(source)
    assert len(source.classes) == 43
    assert min(manifest.train_counts) > 0
    assert min(manifest.test_counts) > 0
    assert all(record.unit and record.unit.split("/")[0] == source.classes[record.label] for record in source.train)
    parts = partition(source.train, 43, PartitionConfig(scheme="natural", clients=20))
    owner = {source.train[i].unit: c for c, part in enumerate(parts) for i in part}
    assert all(owner[source.train[i].unit] == c for c, part in enumerate(parts) for i in part)
    assert load_images(source, source.test[:5], 32).std() > 0
