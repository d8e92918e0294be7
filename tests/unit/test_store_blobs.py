"""Content-addressed blobs: whole or absent, verified at every read, no way out of the folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fedvit.errors import IntegrityError
from fedvit.ports import BlobStorePort
from fedvit.store.blobs import FileBlobStore

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def blobs(root: Path) -> BlobStorePort:
    return FileBlobStore(root)


def file_of(root: Path, digest: str) -> Path:
    return root / "sha256" / digest[:2] / digest


def test_layout_is_the_documented_one(blobs: BlobStorePort, root: Path) -> None:
    blobs.put(CONTENT)
    assert file_of(root, DIGEST).read_bytes() == CONTENT
    assert file_of(root, DIGEST).stat().st_mode & 0o777 == 0o600


def test_putting_again_rewrites_nothing(blobs: BlobStorePort, root: Path) -> None:
    blobs.put(CONTENT)
    inode = file_of(root, DIGEST).stat().st_ino
    assert blobs.put(CONTENT) == DIGEST
    assert file_of(root, DIGEST).stat().st_ino == inode


@pytest.mark.parametrize("damage", [b"Weights", b"weig", b""])
def test_damage_is_noticed_by_get_and_mended_by_put(blobs: BlobStorePort, root: Path, damage: bytes) -> None:
    blobs.put(CONTENT)
    file_of(root, DIGEST).write_bytes(damage)
    with pytest.raises(IntegrityError) as refused:
        blobs.get(DIGEST)
    assert refused.value.details["digest"] == DIGEST
    blobs.put(CONTENT)
    assert blobs.get(DIGEST) == CONTENT


def test_a_put_that_fails_leaves_neither_blob_nor_draft(
    blobs: BlobStorePort, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", disk_full)
        with pytest.raises(OSError) as refused:
            blobs.put(CONTENT)
    assert refused.value.errno == 28
    assert [path for path in root.rglob("*") if path.is_file()] == []
    assert blobs.put(CONTENT) == DIGEST
