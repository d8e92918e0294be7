"""The parts of the inference replicas that need no Ray to run; their routes are those of test_edge_server."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedvit.errors import UsageError
from fedvit.settings import load_settings

app_module = pytest.importorskip("serve_apps.inference.app")


def test_a_replicas_cache_is_its_own_while_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[object] = []
    monkeypatch.setattr(app_module, "_held_locks", held)
    root = tmp_path / "inference"
    first = app_module.claim_cache(root, "first")
    (first / "model").write_text("kept")
    second = app_module.claim_cache(root, "second")
    assert {path.name for path in root.iterdir() if path.is_dir()} == {"first", "second"}
    assert (first / "model").read_text() == "kept"
    # The first replica dies, and the kernel lets go of its lock.
    held.pop(0).close()  # type: ignore[attr-defined]
    third = app_module.claim_cache(root, "third")
    assert {path for path in root.iterdir() if path.is_dir()} == {second, third}


def test_a_bad_trusted_key_is_said_before_anything_is_deployed() -> None:
    with pytest.raises(UsageError):
        app_module.build_inference_app(load_settings(environ={}), control_url="http://x:1", trusted_key="nonsense")
