"""Integration tests drive the installed commands as a user does, each in a state folder and on ports of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command import SMALL, Fedvit
from PIL import Image


@pytest.fixture
def fedvit(tmp_path: Path) -> Iterator[Fedvit]:
    """A small system; whatever a failed test left running is stopped."""
    system = Fedvit(tmp_path / "var", dict(SMALL))
    yield system
    system.call("down", configured=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of small pictures, red and green, 48 to train on, for tests of what goes round the learning."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for channel, name in enumerate(("red", "green")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"
