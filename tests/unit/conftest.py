"""Unit tests run without Ray: starting it is an error, not a slow success."""

from __future__ import annotations

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
