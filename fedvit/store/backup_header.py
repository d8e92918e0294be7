"""Signed header of a backup: the digest of the payload behind it, and whose keys open that.

A backup is :data:`HEADER_BYTES` of JSON, padded with spaces, and a payload: a tar.gz, encrypted in the age format
(https://age-encryption.org/v1) or plain. Without fedvit ``tail -c +4097 BACKUP | age -d -i backup.key | tar xz`` opens
it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedvit.errors import IntegrityError
from fedvit.wire.signatures import sign_document, verify_document

HEADER_BYTES = 4096
MAX_RECIPIENTS = 20
ROOT_KEY = Path("keys") / "root.key"
_CHUNK = 2**20
_KIND = {"_type": "fedvit-backup", "format": 1}
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BackupHeader(BaseModel):
    """What is signed.

    Attributes:
        created_at: ISO 8601.
        payload_sha256: of everything behind the header.
        payload_bytes: its length.
        recipients: public age keys that the payload is encrypted to; none where it is plain.
        locked_identity: the private part of the recipient, encrypted with a passphrase, in age's ASCII armour.
        holds_keys: whether the payload holds the keys of the system.
        root_key_id: see :func:`root_key_id`; None where the system had no root key yet.
        signing_key_id: see :func:`fedvit.wire.signatures.key_id`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    created_at: str
    payload_sha256: _Digest
    payload_bytes: int = Field(ge=0)
    recipients: list[str] = Field(max_length=MAX_RECIPIENTS)
    locked_identity: str | None
    holds_keys: bool
    root_key_id: _Digest | None
    signing_key_id: _Digest

    def signed(self, key: Ed25519PrivateKey) -> bytes:
        """The header as it stands in a file."""
        content = sign_document({**_KIND, **self.model_dump()}, key).encode()
        if len(content) >= HEADER_BYTES:
            raise IntegrityError(f"The header of the backup has {len(content)} bytes.", cure="Name fewer recipients.")
        return content.ljust(HEADER_BYTES - 1) + b"\n"


def read_header(file: IO[bytes], trusted: Sequence[Ed25519PublicKey]) -> BackupHeader:
    """The header of a backup, and nothing behind it, once the signature and the payload's digest are verified.

    ``file`` is left behind the header.

    Raises:
        IntegrityError: it is no backup, none of the ``trusted`` keys signed it, or its payload is another one.
    """
    start = file.read(HEADER_BYTES)
    if len(start) < HEADER_BYTES or not start.startswith(b"{"):
        raise IntegrityError("it is no backup that fedvit signed")
    fields = verify_document(start.decode("utf-8", "replace"), trusted, "backup", HEADER_BYTES)
    if {name: fields.pop(name, None) for name in _KIND} != _KIND:
        raise IntegrityError("it was signed as something else than a backup of this format")
    try:
        header = BackupHeader.model_validate(fields)
    except ValidationError as error:
        raise IntegrityError(f"its header is not as it should be: {error.errors()[0]['msg']}") from None
    payload = PayloadReader(file)
    while payload.bytes_read <= header.payload_bytes and payload.read(_CHUNK):
        pass
    payload.check(header)
    file.seek(HEADER_BYTES)
    return header


class PayloadReader:
    """A payload that is digested while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.bytes_read = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        content = self._file.read(size)
        self._digest.update(content)
        self.bytes_read += len(content)
        return content

    def check(self, header: BackupHeader) -> None:
        """Raise IntegrityError unless exactly the signed payload was read."""
        if (self.bytes_read, self._digest.hexdigest()) != (header.payload_bytes, header.payload_sha256):
            raise IntegrityError("its content is not what was signed")


class PayloadWriter:
    """A payload that is digested while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.bytes_written = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        """Write all of it."""
        self._digest.update(content)
        self.bytes_written += len(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Nothing: the file is flushed when it is published."""

    def sha256(self) -> str:
        """The digest of what was written, hex."""
        return self._digest.hexdigest()


def root_key_id(home: Path) -> str | None:
    """A name for the root key of a state folder that does not tell the key, hex; None where there is no such key."""
    path = home / ROOT_KEY
    return hmac.new(path.read_bytes(), b"root key id", "sha256").hexdigest() if path.exists() else None
