"""Content-addressed blobs: whole or absent, verified at every read, no way out of the folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fedvit.errors import IntegrityError, NotFoundError
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


@pytest.mark.parametrize("content", [b"", CONTENT, bytes(range(256)) * 4096])
def test_what_was_put_comes_back(blobs: BlobStorePort, content: bytes) -> None:
    digest = blobs.put(content)
    assert digest == hashlib.sha256(content).hexdigest()
    assert blobs.get(digest) == content
    assert blobs.path(digest).read_bytes() == content


def test_layout_is_the_documented_one(blobs: BlobStorePort, root: Path) -> None:
    blobs.put(CONTENT)
    assert blobs.path(DIGEST) == root / "sha256" / DIGEST[:2] / DIGEST


def test_putting_again_rewrites_nothing(blobs: BlobStorePort) -> None:
    blobs.put(CONTENT)
    inode = blobs.path(DIGEST).stat().st_ino
    assert blobs.put(CONTENT) == DIGEST
    assert blobs.path(DIGEST).stat().st_ino == inode


@pytest.mark.parametrize("damage", [b"Weights", b"weig", b""])
def test_damage_is_noticed_by_get_and_mended_by_put(blobs: BlobStorePort, damage: bytes) -> None:
    blobs.put(CONTENT)
    blobs.path(DIGEST).write_bytes(damage)
    with pytest.raises(IntegrityError, match=DIGEST):
        blobs.get(DIGEST)
    blobs.put(CONTENT)
    assert blobs.get(DIGEST) == CONTENT


@pytest.mark.parametrize(
    "digest",
    ["", "ab", DIGEST.upper(), DIGEST[:-1], DIGEST + "0", DIGEST + "\n", "../" * 20 + "etc/passwd", "/" + DIGEST],
)
def test_what_is_no_digest_names_no_blob(blobs: BlobStorePort, digest: str) -> None:
    blobs.put(CONTENT)
    with pytest.raises(NotFoundError, match="names no blob"):
        blobs.get(digest)
    with pytest.raises(NotFoundError, match="names no blob"):
        blobs.path(digest)


def test_an_absent_blob_is_not_found(blobs: BlobStorePort) -> None:
    with pytest.raises(NotFoundError, match=DIGEST):
        blobs.get(DIGEST)
    with pytest.raises(NotFoundError, match=DIGEST):
        blobs.path(DIGEST)


def test_a_put_that_fails_leaves_neither_blob_nor_draft(
    blobs: BlobStorePort, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", disk_full)
        with pytest.raises(OSError, match="No space"):
            blobs.put(CONTENT)
    assert [path for path in root.rglob("*") if path.is_file()] == []
    assert blobs.put(CONTENT) == DIGEST
