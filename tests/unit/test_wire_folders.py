"""Folders of the backup channel: a local one and one in an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedvit.errors import ConfigError, DataError, NotFoundError
from fedvit.wire.folders import Folder, LocalFolder, open_folder


@pytest.mark.parametrize("make", [lambda root: LocalFolder(root), lambda _: open_folder("memory://folder-test")])
def test_both_kinds_of_folder_keep_the_same_promises(tmp_path: Path, make: Any) -> None:
    folder: Folder = make(tmp_path / "box")
    assert (folder.files("a"), folder.folders("a")) == ([], [])
    folder.write("a/b/x.json", b"one")
    folder.write("a/b/x.json", b"two")
    folder.write("a/b/.draft", b"?")
    assert (folder.folders("a"), folder.files("a"), folder.files("a/b")) == (["b"], [], ["x.json"])
    assert folder.read("a/b/x.json", 3) == b"two"
    with pytest.raises(DataError):
        folder.read("a/b/x.json", 2)
    folder.move("a/b/x.json", "c/y.json")
    folder.move("a/b/x.json", "c/z.json")
    assert (folder.files("a/b"), folder.files("c")) == ([], ["y.json"])
    folder.remove("c/y.json")
    folder.remove("c/y.json")
    with pytest.raises(NotFoundError):
        folder.read("c/y.json", 10)


def test_a_url_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError):
        open_folder("nonsense://x")
