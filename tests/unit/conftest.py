"""Unit tests run without Ray (starting it is an error, not a slow success) and without the caller's settings."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest
import ray


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid ``ray.init`` in every unit test, also where the code under test imports Ray itself."""

    def forbidden(*_: object, **__: object) -> NoReturn:
        pytest.fail("a unit test called ray.init")

    monkeypatch.setattr(ray, "init", forbidden)
    monkeypatch.setenv("RAY_ADDRESS", "forbidden-in-unit-tests:1")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever configures fedvit outside must not reach a test."""
    for name in [name for name in os.environ if name.startswith("FEDVIT_")]:
        monkeypatch.delenv(name)
