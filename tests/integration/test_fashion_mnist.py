"""One data set that others made, as a folder, as a zip with a parent folder and as Training/Testing.

The three runs on Debian's Fashion-MNIST have one digest and equal figures. FASHION=full takes all 70,000 images, in
about 20 minutes, instead of 500.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from command import SMALL, Fedvit
from PIL import Image

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
FULL = os.environ.get("FASHION") == "full"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.campaign,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not PACKAGE.is_dir(), reason="needs Debian's package dataset-fashion-mnist"),
]
# In the order of the labels.
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
SPLITS = {"train": ("train", 400), "test": ("t10k", 100)}
SETTINGS = {
    **SMALL,
    "data.source": "folder",
    "data.image_size": "32",
    "training.rounds": "2",
    "privacy.noise_multiplier": "null",
    "privacy.sampling_prob": "0.05" if FULL else "0.5",
}


def values(name: str, shape: tuple[int, ...], header: int) -> np.ndarray:
    """The bytes of an IDX file after its header."""
    return np.frombuffer(gzip.decompress((PACKAGE / f"{name}-ubyte.gz").read_bytes())[header:], np.uint8).reshape(shape)


def write_folder(root: Path) -> int:
    """Write ``train/<class>/*.png`` and ``test/<class>/*.png``; the number of images."""
    total = 0
    for split, (stem, few) in SPLITS.items():
        labels = values(f"{stem}-labels-idx1", (-1,), 8)
        pixels = values(f"{stem}-images-idx3", (-1, 28, 28), 16)
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
        for i in range(len(labels) if FULL else few):
            Image.fromarray(pixels[i]).save(root / split / CLASSES[labels[i]] / f"{i:05d}.png")
            total += 1
    return total


@pytest.fixture
def layouts(tmp_path: Path) -> dict[str, Path]:
    folder, archive, names = tmp_path / "folder", tmp_path / "parent.zip", tmp_path / "names"
    assert write_folder(folder) == (70_000 if FULL else 500)
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, Path("fashion") / path.relative_to(folder))
    names.mkdir()
    for split, name in (("train", "Training"), ("test", "Testing")):
        (names / name).symlink_to(folder / split)
    return {"folder": folder, "zip": archive, "names": names}


def test_a_data_set_in_three_layouts_gives_one_digest_and_one_model(layouts: dict[str, Path], tmp_path: Path) -> None:
    results = {}
    for name, place in layouts.items():
        fedvit = Fedvit(tmp_path / f"home-{name}", {**SETTINGS, "data.path": str(place)})
        if results:
            # One root key, so that samples and noise are equal as well.
            fedvit.home.mkdir(mode=0o700)
            (fedvit.home / "keys").mkdir(mode=0o700)
            shutil.copy2(tmp_path / "home-folder" / "keys" / "root.key", fedvit.home / "keys")
        done = fedvit.call("run", timeout_s=3000)
        assert done.returncode == 0, done.stdout + done.stderr
        results[name] = figures_of(fedvit.home)
        print(name, results[name])
    assert results["zip"] == results["folder"]
    assert results["names"] == results["folder"]


def figures_of(home: Path) -> dict[str, object]:
    """What does not depend on the machine's speed or on ports."""
    summary = json.loads((home / "report" / "summary.json").read_text())
    names = ("test_accuracy", "recall", "epsilon", "noise_multiplier", "rounds", "data")
    targets = {name: (each["accuracy"], each["agreement"]) for name, each in summary["targets"].items()}
    print(summary["seconds"])
    return {**{name: summary[name] for name in names}, "targets": targets}
