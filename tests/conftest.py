"""Puts this folder on the import path, so that every kind of test can use the helpers in it."""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadFileScheduling


class _ByFolder(LoadFileScheduling):
    """Files stay together on a worker, and so do those of a folder whose tests share one running system."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "tests/chaos" if file.startswith("tests/chaos/") else file


def pytest_xdist_make_scheduler(config: Any, log: Any) -> LoadFileScheduling | None:
    """Ours for ``--dist loadfile``. xdist's groups by mark do not read the node ids of pytest 9.2."""
    return _ByFolder(config, log) if config.getvalue("dist") == "loadfile" else None
