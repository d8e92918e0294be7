"""Releases, roll-backs and switches while requests arrive everywhere: none fails, each answer names its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import Fedvit
from load import Key, Load, await_true

from fedvit.config import DataConfig
from fedvit.data.sources import open_source
from fedvit.store.records import Release
from fedvit.store.store import Store

FULL = os.environ.get("CHAOS") == "full"
# What is done in turn: 10 releases, 5 roll-backs, 3 switches; in short 2, 1 and 1.
STEPS = (
    "release rollback release switch release rollback release release rollback release switch release rollback "
    "release release rollback switch release"
    if FULL
    else "release rollback switch release"
).split()
OTHER = {"standard": "edge_optimized", "edge_optimized": "standard"}

pytestmark = [pytest.mark.ray, *([pytest.mark.timeout(3600)] if FULL else [])]


class Operator:
    """Does one step after another through the API, each after everybody took the one before."""

    def __init__(self, fedvit: Fedvit, store: Store, load: Load) -> None:
        self.http = httpx.Client(base_url=fedvit.control, timeout=120)
        self._store, self._load = store, load

    def current(self) -> Release:
        release = self._store.releases.current()
        assert release is not None
        return release

    def do(self, step: str) -> None:
        before = self.current()
        if step == "release":
            self._post("/api/model/retrain", {"strategy": "fine_tune"}, 202)
        elif step == "rollback":
            self._post("/api/model/rollback", {"version": self._store.releases.all()[0].version, "force": True}, 200)
        else:
            self._post("/api/model/switch", {"variant": OTHER[before.serve_variant or "standard"]}, 200)
        await_true(lambda: self.current().sequence > before.sequence, f"{step} after {before.version}")
        self._load.settle(key_of(self.current()), len(self._store.releases.all()) - 1)

    def _post(self, path: str, body: dict[str, Any], status: int) -> None:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text


def key_of(release: Release) -> Key:
    return release.version, release.serve_variant or "standard"


def check_answers(load: Load, releases: list[Release]) -> None:
    """Each answer came from a release that somebody could be told to run between its beginning and its end."""
    assert [answer.fault for answer in load.answers if answer.fault] == []
    for answer in load.answers:
        known = [release for release in releases if release.at <= answer.ended_at]
        assert answer.key in [key_of(release) for release in known[answer.settled :]], answer


def test_nobody_notices_releases_rollbacks_and_switches(running: Fedvit) -> None:
    places = running.json("up")
    targets = {name: places[name] for name in ("inference", "edge-1", "edge-2")}
    with Store.open(running.home) as store:
        await_true(lambda: store.releases.current() is not None, "the first release")
        await_true(lambda: all(_serves(base) for base in targets.values()), "a model everywhere")
        with Load(targets, _image()) as load:
            operator, before = Operator(running, store, load), len(store.releases.all())
            load.settle(key_of(operator.current()), before - 1)
            for step in STEPS:
                operator.do(step)
            check_damage_is_refused(operator, store, load)
        check_answers(load, store.releases.all())
        assert [r.sequence for r in store.releases.all()] == list(range(1, len(store.releases.all()) + 1))
        assert len(store.releases.all()) >= before + len(STEPS)
    print(f"{len(load.answers)} answers by {len({answer.key for answer in load.answers})} models, none failed")


def _serves(base: str) -> bool:
    return httpx.get(f"{base}/health", timeout=60).status_code == 200


def _image() -> bytes:
    source = open_source(DataConfig())
    return source.read(source.test[0])


def check_damage_is_refused(operator: Operator, store: Store, load: Load) -> None:
    """One flipped bit in a stored model: nobody is moved to it; mended, everybody is."""
    current = operator.current()
    variant = OTHER[current.serve_variant or "standard"]
    digest = current.artifacts[variant]
    path = store.home / "blobs" / "sha256" / digest[:2] / digest
    good = path.read_bytes()
    _replace(path, flipped(good))
    answer = operator.http.post("/api/model/switch", json={"variant": variant})
    assert (answer.status_code, answer.json()["type"]) == (502, "/problems/integrity")
    assert operator.current() == current
    load.hold(key_of(current), answers=3)
    _replace(path, good)
    operator.do("switch")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _replace(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)
