"""What every kind of test can use; being here puts this folder's helpers on the import path."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from xdist.scheduler import LoadFileScheduling

# A suite in the background inherits an ignored SIGINT, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


class _ByFolder(LoadFileScheduling):
    """Files stay together on a worker, and so do those of a folder whose tests share one running system."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "tests/chaos" if file.startswith("tests/chaos/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> LoadFileScheduling | None:
    """Ours for ``--dist loadfile``. xdist's groups by mark do not read the node ids of pytest 9.2."""
    return _ByFolder(config, log) if config.getvalue("dist") == "loadfile" else None


_NOT_RUN = pytest.StashKey[str]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail in CI where every test was skipped: a campaign without its programs must not look like one that passed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    stats = reporter.stats if reporter else {}
    if stats.get("skipped") and not any(stats.get(kind) for kind in ("passed", "failed", "error", "xfailed")):
        reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in stats["skipped"]}
        session.config.stash[_NOT_RUN] = f"Not run: {len(stats['skipped'])} tests. {'; '.join(sorted(reasons))}"
        if os.environ.get("CI"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Say in the last line what was not run, where nothing was."""
    if _NOT_RUN in config.stash:
        print(config.stash[_NOT_RUN])


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
