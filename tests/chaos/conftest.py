"""Campaigns against a real, small system. ``make chaos`` runs the long ones, ``make test`` a short form of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import SMALL, Fedvit

FULL = os.environ.get("CHAOS") == "full"


@pytest.fixture
def fedvit(tmp_path: Path) -> Iterator[Fedvit]:
    """A small system that makes a release of every round; whatever a failed test left running is stopped."""
    yield from _small_system(tmp_path)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fedvit]:
    """One such system that runs, for all who leave it running: a start is what costs most here."""
    for system in _small_system(tmp_path_factory.mktemp("running")):
        system.json("up")
        yield system


def _small_system(folder: Path) -> Iterator[Fedvit]:
    settings = {
        **SMALL,
        "training.rounds": "1",
        "release.every_rounds": "1",
        "release.max_accuracy_drop": "1.0",
        "privacy.target_epsilon": "1000",
        "serving.inference_max_replicas": "1",
        "serving.poll_interval_s": "0.2",
        "edge.poll_interval_s": "0.2",
    }
    system = Fedvit(folder / "var", settings)
    yield system
    system.call("down", configured=False)
