"""The blob store port: files, and the shipped double in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedvit.errors import NotFoundError
from fedvit.ports import BlobStorePort
from fedvit.store.blobs import FileBlobStore
from fedvit.testing.doubles import MemoryBlobStore

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=["files", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStorePort:
    return FileBlobStore(tmp_path / "blobs") if request.param == "files" else MemoryBlobStore()


@pytest.mark.parametrize("content", [b"", CONTENT, bytes(range(256)) * 4096])
def test_a_stored_blob_can_be_read(blobs: BlobStorePort, content: bytes) -> None:
    digest = blobs.put(content)
    assert digest == hashlib.sha256(content).hexdigest()
    assert blobs.get(digest) == content
    assert blobs.size(digest) == len(content)
    assert blobs.get_range(digest, 2, 5) == content[2:5]
    assert blobs.put_pieces([content[:3], memoryview(content[3:])]) == digest


def test_storing_twice_is_harmless(blobs: BlobStorePort) -> None:
    assert blobs.put(CONTENT) == blobs.put(CONTENT) == DIGEST
    assert blobs.get(DIGEST) == CONTENT


@pytest.mark.parametrize(
    "digest",
    [
        "0" * 64,
        "",
        "ab",
        DIGEST.upper(),
        DIGEST[:-1],
        DIGEST + "0",
        DIGEST + "\n",
        "../" * 20 + "etc/passwd",
        "/" + DIGEST,
    ],
)
def test_an_absent_blob_is_not_found(blobs: BlobStorePort, digest: str) -> None:
    blobs.put(CONTENT)
    for missing in (blobs.get, blobs.size, lambda name: blobs.get_range(name, 0, 1)):
        with pytest.raises(NotFoundError):
            missing(digest)
