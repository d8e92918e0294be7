"""Virtual fleet: the partition, and images that two clients have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedvit.config import DataConfig, PartitionConfig
from fedvit.data.partition import VirtualFleet
from fedvit.errors import DataError


def fleet(folder: Path, *, twice: bool) -> VirtualFleet:
    """Four pictures of two classes, dealt to two clients by label; one picture may be in both classes."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(4)]
    for split in ("train", "test"):
        for index, image in enumerate(pixels):
            place = folder / split / ("green", "red")[index // 2]
            place.mkdir(parents=True, exist_ok=True)
            same = twice and split == "train" and index == 3
            Image.fromarray(pixels[0] if same else image).save(place / f"{index}.png")
    parts = PartitionConfig(scheme="shard", clients=2, shards_per_client=1, min_examples=2)
    return VirtualFleet.open(DataConfig(source="folder", path=folder, image_size=16, partition=parts))


def test_one_image_with_two_clients_is_named_with_both(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        fleet(tmp_path, twice=True).check_disjoint()
    for word in ("0.png", "3.png", "vehicle-00", "vehicle-01"):
        assert word in str(refused.value)


def test_different_images_belong_to_one_client_each(tmp_path: Path) -> None:
    virtual_fleet = fleet(tmp_path, twice=False)
    virtual_fleet.check_disjoint()
    assert sorted(i for part in virtual_fleet.parts.values() for i in part) == [0, 1, 2, 3]
