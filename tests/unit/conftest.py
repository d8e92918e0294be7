"""Unit tests run without Ray (starting it is an error, not a slow success) and without the caller's settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import ray

if TYPE_CHECKING:
    from control_system import System
    from scoped_api import ScopedApi

    from fedvit.testing.doubles import FakeFleet, PointModel


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


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., System]]:
    """Builds control APIs with a training loop, over one state folder."""
    from control_system import TARGET, System

    from fedvit.testing.doubles import FakeFleet, PointModel

    with ExitStack() as stack:

        def build(
            model: PointModel | None = None, fleet: FakeFleet | None = None, *, epsilon: float = 8.0, **release: Any
        ) -> System:
            model, fleet = model or PointModel(TARGET), fleet or FakeFleet(TARGET)
            return stack.enter_context(closing(System(tmp_path / "home", model, fleet, release, epsilon)))

        yield build


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[ScopedApi]:
    """A control API that demands tokens."""
    from scoped_api import ScopedApi

    with ScopedApi(tmp_path, mode="tokens") as api:
        yield api


@pytest.fixture
def site(tmp_path: Path) -> Iterator[ScopedApi]:
    """A control API in the open loopback mode."""
    from scoped_api import ScopedApi

    with ScopedApi(tmp_path) as api:
        yield api
