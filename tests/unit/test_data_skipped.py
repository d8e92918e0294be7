"""What `fedvit data inspect` says about files that are left out, equal images and classes of few images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raises import raises_naming
from typer.testing import CliRunner

from edge_runtime.training.records import OwnRecords
from fedvit.cli.main import app
from fedvit.config import DataConfig, PrivacyConfig, Settings, TrainingConfig
from fedvit.config.training import CohortConfig
from fedvit.data.noise_risk import LEAST_SIGNAL, classes_at_risk, signals
from fedvit.data.partition import VirtualFleet
from fedvit.data.records import load_images
from fedvit.data.skipped import skipped_files
from fedvit.data.sources import open_source
from fedvit.errors import DataError
from fedvit.settings import load_settings


def image(seed: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def put(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    root = tmp_path / "signs"
    for split, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(("stop", "yield")):
            for i in range(count):
                put(root / split / name / f"{i}.png", image(100 * len(split) + 10 * c + i))
    return root


def skipped(root: Path) -> dict[str, int]:
    return {name: each.files for each in skipped_files(open_source(folder(root))) for name in each.examples}


def folder(root: Path) -> DataConfig:
    return DataConfig(source="folder", path=root)


def test_every_file_that_is_left_out_has_a_reason(signs: Path) -> None:
    assert skipped(signs) == {}
    for name in ("train/stop/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "train/stop/._0.png", "__MACOSX/train/stop/1.png"):
        put(signs / name)
    for name in ("train/stop/7.TIF", "train/stop/8.tif", "train/yield/9.gif", "labels.csv", "train/stop/Thumbs.db"):
        put(signs / name)
    put(signs / "train/loose.png")
    put(signs / "valid/stop/0.png")
    source = open_source(folder(signs))
    files = {name: each for each in skipped_files(source) for name in each.examples}
    assert len(source.train) == 12
    assert set(files) == {
        *("train/stop/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "train/stop/._0.png", "__MACOSX/train/stop/1.png"),
        *("train/stop/7.TIF", "train/stop/8.tif", "train/yield/9.gif", "labels.csv", "train/stop/Thumbs.db"),
        *("train/loose.png", "valid/stop/0.png"),
    }
    assert files["train/stop/7.TIF"] is files["train/stop/8.tif"]
    assert len({each.reason for each in files.values()}) == 6


def test_further_spellings_of_readable_formats_are_taken_in(signs: Path) -> None:
    more = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.pgm": "PPM", "d.pbm": "PPM", "e.pnm": "PPM"}
    for i, (name, kind) in enumerate(more.items()):
        put(signs / "train/stop" / name, image(900 + i, kind, {"c.pgm": "L", "d.pbm": "1"}.get(name, "RGB")))
    source = open_source(folder(signs))
    assert skipped(signs) == {}
    assert {record.key.split("/")[-1] for record in source.train} >= set(more)
    assert load_images(source, source.train, 16).shape == (17, 16, 16, 3)


def test_thumbnails_are_no_class(signs: Path) -> None:
    put(signs / "train/@eaDir/stop@SynoEAStream", b"x")
    put(signs / "@eaDir/train/thumb.jpg", image(1, "JPEG"))
    assert open_source(folder(signs)).classes == ("stop", "yield")


def test_the_demonstration_leaves_nothing_out_and_names_its_small_class() -> None:
    settings = load_settings(environ={})
    fleet = VirtualFleet.open(settings.data)
    assert skipped_files(fleet.source) == []
    assert [(each.name, each.train) for each in classes_at_risk(settings, fleet)] == [("yellow", 35)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_of_another_format_only_is_refused_with_the_format(signs: Path, split: str) -> None:
    for path in (signs / split).rglob("*.png"):
        path.rename(path.with_suffix(".tiff"))
    with raises_naming(DataError, ".tiff"):
        open_source(folder(signs))


def test_a_vehicle_with_images_of_another_format_is_told_so(tmp_path: Path) -> None:
    put(tmp_path / "stop/0.heic")
    with raises_naming(DataError, "1 .heic"):
        OwnRecords.open(tmp_path, ("stop", "yield"))


def inspected(signs: Path, home: Path, *more: str) -> str:
    settings = ["data.source=folder", "data.partition.clients=2", "data.partition.scheme=iid", "data.image_size=16"]
    settings += ["data.partition.min_examples=2", "privacy.noise_multiplier=5", "training.rounds=1"]
    arguments = [part for each in settings for part in ("--set", each)]
    shown = CliRunner().invoke(app, ["data", "inspect", "--home", str(home), "--data", str(signs), *arguments, *more])
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def test_inspect_lists_skipped_files_equal_images_and_classes_at_risk(signs: Path, tmp_path: Path) -> None:
    put(signs / "train/stop/7.tif")
    put(signs / "train/stop/copy.png", image(9000))
    put(signs / "train/yield/copy.png", image(9000))
    facts = json.loads(inspected(signs, tmp_path / "home", "--json"))
    assert [(each["files"], each["examples"]) for each in facts["skipped"]] == [(1, ["train/stop/7.tif"])]
    assert facts["duplicates_within_train"] == 1
    assert facts["equal_training_images"] == [
        {"images": ["train/stop/copy.png", "train/yield/copy.png"], "classes": ["stop", "yield"]}
    ]
    assert {each["name"]: each["train"] for each in facts["classes_at_risk"]} == {"stop": 7, "yield": 7}


@pytest.mark.parametrize("most_clients", [2, 1])
def test_inspect_shows_tables_to_people(
    signs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_clients: int
) -> None:
    monkeypatch.setattr("fedvit.cli.maintenance.MOST_CLIENTS", most_clients)
    lines = [line.split() for line in inspected(signs, tmp_path / "home").splitlines()]
    assert ["class", "train", "test"] in lines
    assert ["stop", "6", "2"] in lines
    assert not any(mark in word for line in lines for word in line for mark in "{}[]")
    # The images of each client are a table where it can be read.
    assert (["client", "stop", "yield"] in lines) is (most_clients == 2)
    assert sum(line[:1] == ["vehicle-00"] for line in lines) == most_clients - 1


def test_the_signal_of_a_class_grows_with_its_images_and_with_the_rounds() -> None:
    def ratio(images: int, rounds: int = 30, sigma: float = 2.0, **privacy: str) -> float:
        cohort = CohortConfig(selection="poisson", sampling_prob=0.5) if privacy else CohortConfig()
        settings = Settings(
            training=TrainingConfig(rounds=rounds, cohort=cohort), privacy=PrivacyConfig.model_validate(privacy)
        )
        return signals(settings, [[images, 50], [images, 50]], sigma)[0]

    # q n sqrt(steps) / (sigma sqrt(clients)), and for clients p sqrt(rounds) / sigma times the sum of the shares.
    assert ratio(20) == pytest.approx(0.5 * 40 * 30**0.5 / (2.0 * 2**0.5))
    assert ratio(1) < LEAST_SIGNAL < ratio(20)
    assert ratio(20, rounds=120) == pytest.approx(2 * ratio(20))
    assert ratio(50, privacy_unit="client") == pytest.approx(0.5 * 30**0.5 / 2.0)
