"""Keys of backups: whom a backup is encrypted to, who opens one, and whose signature on it is trusted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedvit.atomic_write import create_atomically
from fedvit.config import BackupConfig
from fedvit.errors import IntegrityError, StateError, UsageError
from fedvit.private_files import FILE_MODE, ensure_private, open_private_folder
from fedvit.store.backup_header import BackupHeader
from fedvit.wire.manifest import (
    SIGNING_KEY_FILE,
    load_or_create_signing_key,
    parse_public_key,
    public_key_text,
)

KEYS = "keys"
BACKUP_KEY = Path(KEYS) / "backup.key"
MIN_PASSPHRASE_CHARACTERS = 12
_SECRET, _SIGNER = "AGE-SECRET-KEY-", "# signer: "
_NOTE = "# Opens the backups of this system, an age identity. Keep a copy of this folder on another machine.\n"


@dataclass(frozen=True, slots=True)
class Recipients:
    """Whom a backup is encrypted to; see :class:`BackupHeader`.

    ``key_file`` opens the backup, where it is a file of the state folder itself.
    """

    names: tuple[str, ...] = ()
    locked_identity: str | None = None
    key_file: Path | None = None


def recipients_of(home: Path, config: BackupConfig) -> Recipients:
    """The recipients that the settings name, by default the key in the state folder, which is created where missing.

    Raises:
        UsageError: the passphrase cannot be read, or is too short.
        StateError: the key in the state folder is none.
    """
    # Imported here: a vehicle's ledger is a store, too, and has no backups.
    from pyrage import passphrase, x25519

    if config.recipients:
        return Recipients(config.recipients)
    if config.passphrase_file is not None:
        identity = x25519.Identity.generate()
        locked = passphrase.encrypt(str(identity).encode(), read_passphrase(config.passphrase_file), armored=True)
        return Recipients((str(identity.to_public()),), locked.decode())
    load_or_create_backup_key(home)
    try:
        (identity,) = _identities(home / BACKUP_KEY)
    except (UsageError, ValueError) as error:
        raise StateError(f"{home / BACKUP_KEY} holds no age identity.", cure="Restore it from its copy.") from error
    return Recipients((str(identity.to_public()),), key_file=home / BACKUP_KEY)


def load_or_create_backup_key(home: Path) -> bool:
    """Make sure that the state folder has a key for its backups; return whether it was created now."""
    from pyrage import x25519

    path = home / BACKUP_KEY
    open_private_folder(path.parent)
    created = False
    if not path.exists():
        signer = public_key_text(load_or_create_signing_key(path.parent).public_key())
        text = f"{_NOTE}{_SIGNER}{signer}\n{x25519.Identity.generate()}\n"
        created = create_atomically(path, text.encode(), mode=FILE_MODE)
    ensure_private([path])
    return created


def read_passphrase(path: Path) -> str:
    """The passphrase in a file, without white space around it.

    Raises:
        UsageError: there is none, or it is too short.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The passphrase file {path} cannot be read: {error}.") from None
    if len(text) < MIN_PASSPHRASE_CHARACTERS:
        raise UsageError(
            f"The passphrase in {path} has {len(text)} characters.",
            cure=f"Use at least {MIN_PASSPHRASE_CHARACTERS}, from a random source.",
        )
    return text


@dataclass(frozen=True, slots=True)
class RestoreKeys:
    """What a restore needs besides the archive.

    Attributes:
        key_file: a file of age identities; by default ``keys/backup.key`` of the state folder.
        passphrase_file: for an archive that was encrypted with a passphrase.
        verify_keys: public keys, one of which must have signed the archive; by default that of the state folder, and
            the one that the key file names.
    """

    key_file: Path | None = None
    passphrase_file: Path | None = None
    verify_keys: tuple[Ed25519PublicKey, ...] = ()

    def signers(self, home: Path) -> list[Ed25519PublicKey]:
        """The public keys whose signature is trusted.

        Raises:
            UsageError: there is none.
        """
        if self.verify_keys:
            return list(self.verify_keys)
        keys = []
        if (home / KEYS / SIGNING_KEY_FILE).exists():
            keys.append(load_or_create_signing_key(home / KEYS).public_key())
        path = self._key_file(home)
        if path.exists():
            lines = _lines(path)
            keys += [parse_public_key(line.removeprefix(_SIGNER)) for line in lines if line.startswith(_SIGNER)]
        if not keys:
            raise UsageError(
                f"Nothing at {home / KEYS} says whose signature to trust.",
                cure="Put the copy of that folder there first, or give --verify-key with the public key of the system.",
            )
        return keys

    def identities(self, home: Path, header: BackupHeader) -> list[Any]:
        """The age identities that open a payload; none where it is plain.

        Raises:
            UsageError: the key or the passphrase is missing, or does not open it.
        """
        if not header.recipients:
            return []
        if header.locked_identity is not None:
            return [self._unlocked(header.locked_identity)]
        path = self._key_file(home)
        cure = "Give --key FILE with the key that opens it; by default that is keys/backup.key of the system."
        if not path.exists():
            raise UsageError(f"The archive is encrypted, and there is no key {path}.", cure=cure)
        identities = _identities(path)
        if not any(str(identity.to_public()) in header.recipients for identity in identities):
            raise UsageError(
                f"The archive is encrypted to {', '.join(header.recipients)}, and {path} is another key.", cure=cure
            )
        return identities

    def _key_file(self, home: Path) -> Path:
        return self.key_file or home / BACKUP_KEY

    def _unlocked(self, locked: str) -> Any:
        import pyrage

        if self.passphrase_file is None:
            raise UsageError(
                "The archive is encrypted with a passphrase.", cure="Give --passphrase-file FILE with the passphrase."
            )
        try:
            text = pyrage.passphrase.decrypt(locked.encode(), read_passphrase(self.passphrase_file))
            return pyrage.x25519.Identity.from_str(text.decode())
        except pyrage.DecryptError:
            message = f"The passphrase in {self.passphrase_file} is not that of the archive."
            raise UsageError(message, cure="Give the one that it was made with.") from None


def _identities(path: Path) -> list[Any]:
    """The age identities in a file."""
    import pyrage

    secrets = [line for line in _lines(path) if line.startswith(_SECRET)]
    try:
        identities = [pyrage.x25519.Identity.from_str(secret) for secret in secrets]
    except pyrage.IdentityError:
        identities = []
    if not identities:
        raise UsageError(f"{path} holds no age identity.", cure=f"Give a file with a line {_SECRET}...")
    return identities


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The key file {path} cannot be read: {error}.") from None


def write_encrypted(fill: Callable[[IO[bytes]], object], sink: Any, recipients: Sequence[str]) -> None:
    """Encrypt what ``fill`` writes to the recipients, without a copy of it on the disk.

    Raises:
        UsageError: a recipient is none.
    """
    import pyrage

    try:
        keys = [pyrage.x25519.Recipient.from_str(name) for name in recipients]
    except pyrage.RecipientError as error:
        raise UsageError(f"backup.recipients names no age recipient: {error}.", cure="Name age1... keys.") from None
    read_end, write_end = os.pipe()

    def fill_pipe() -> None:
        with os.fdopen(write_end, "wb") as target:
            fill(target)

    with ThreadPoolExecutor(1) as pool, os.fdopen(read_end, "rb") as source:
        filling = pool.submit(fill_pipe)
        pyrage.encrypt_io(source, sink, keys)
        filling.result()


@contextmanager
def decrypted(source: Any, identities: Sequence[Any]) -> Iterator[IO[bytes]]:
    """What is encrypted in ``source``, to be read to its end; each piece is authenticated before it is given out.

    Raises:
        IntegrityError: it is damaged, or these identities do not open it.
    """
    import pyrage

    read_end, write_end = os.pipe()
    faults: list[Exception] = []

    def decrypt() -> None:
        with os.fdopen(write_end, "wb") as target:
            try:
                pyrage.decrypt_io(source, target, list(identities))
            except Exception as error:
                # Noted before the reader sees the end of the pipe.
                faults.append(error)

    with ThreadPoolExecutor(1) as pool, os.fdopen(read_end, "rb") as plain:
        pool.submit(decrypt)
        try:
            yield plain
        finally:
            if faults:
                raise IntegrityError(f"it cannot be decrypted: {faults[0]}") from None
