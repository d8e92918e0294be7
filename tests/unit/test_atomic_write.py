"""Atomic writes: the old file or the whole new one, the mode asked for, and nothing left beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedvit.atomic_write import create_atomically, draft_in, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["", "größer\n", b"\0" * 100_000])
def test_a_write_replaces_the_whole_file(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "made" / "file"
    write_atomically(path, b"old, and longer than what replaces it")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(path.parent) == ["file"]


def test_the_mode_is_that_of_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("readable by everybody")
    write_atomically(path, b"secret", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    assert create_atomically(tmp_path / "other", b"secret", mode=0o600)
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o600


def test_only_the_first_creates_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert create_atomically(path, b"first")
    assert not create_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["key"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])
    write_atomically(path, b"new", durable=False)
    assert path.read_bytes() == b"new"


def test_a_draft_that_is_not_published_is_deleted(tmp_path: Path) -> None:
    with draft_in(tmp_path) as draft:
        draft.file.write(b"half")
        assert names(tmp_path) == [draft.path.name]
        assert draft.path.name.startswith(".")
    assert names(tmp_path) == []
