"""Release client: fetches, verifies and caches signed releases on replicas and vehicles.

Threats covered (after TUF): arbitrary software (signature and hash are checked before use), rollback (the highest
sequence ever accepted is stored on disk), endless data (nothing is read past its signed length), and an unreachable
server (the last two releases are kept). An operator gives the trusted keys; none is trusted on first use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedvit.atomic_write import Draft, remove_drafts, write_atomically
from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import FedvitError, IntegrityError, StateError, UsageError
from fedvit.ports import ClockPort
from fedvit.registry.backoff import Backoff
from fedvit.registry.feed import ENVELOPE_FILE, MODEL_FILE, Feed
from fedvit.wire.manifest import ReleaseManifest, key_id, verify_manifest

_CURRENT = "release.json"
_PREVIOUS = "previous.json"
_ACCEPTED = "accepted.json"
_PARTIAL = ".part"
# Of the disk, for what else is written beside the artifact.
_SPARE_BYTES = 2**20
FOLLOWED = "served"
"""The folder of a client that follows the fleet."""


@dataclass(frozen=True, slots=True)
class LoadedRelease:
    """A release whose signature, hash and length were checked, and the path of its ONNX file."""

    manifest: ReleaseManifest
    model_path: Path


class ReleaseClient:
    """Polls a feed and caches verified releases in a folder under ``cache_dir``. For one thread at a time.

    Args:
        feed: the source of releases.
        cache_dir: this device's own folder; created if absent.
        trusted: the keys that may sign releases.
        variant: the only variant that is accepted; None follows the variant that the fleet serves.
        clock: the time of the back-off after a download that failed.

    Raises:
        UsageError: no trusted key.
        StateError: the cache cannot be used.
    """

    def __init__(
        self,
        feed: Feed,
        cache_dir: Path,
        trusted: Sequence[Ed25519PublicKey],
        variant: str | None = None,
        clock: ClockPort = SYSTEM_CLOCK,
    ) -> None:
        if not trusted:
            raise UsageError("No trusted key was given.", cure="Give the server's public key.")
        self._feed, self._trusted, self._variant = feed, tuple(trusted), variant
        self.folder = cache_dir / (variant or FOLLOWED)
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # This client alone writes here, so these are of a process that was killed.
            remove_drafts(self.folder)
        self._backoff = Backoff(clock)
        self._failure: tuple[ReleaseManifest, FedvitError] | None = None
        self._envelope: str | None = None
        self._current: ReleaseManifest | None = None

    def poll(self) -> LoadedRelease | None:
        """Fetch the feed's release if it is not the current one; None when there is nothing new.

        An error changes nothing: the current release stays. A download that broke off goes on where it ended, also
        after a restart. One that failed is repeated with exponential back-off; polls in between raise its error again.

        Raises:
            IntegrityError: the release fails a check: signature, fields, variant, sequence, length or hash.
            FeedUnavailableError: the feed does not answer.
            NotFoundError: the artifact is gone; the feed has another release by now.
            StateError: the cache cannot be read or written, or has no room for the artifact.
        """
        envelope = self._feed.current(self._variant)
        if envelope is None or envelope == self._envelope:
            return None
        manifest = self._verify(envelope)
        if self._is_at_hand(manifest):
            self._envelope = envelope
            return None
        self._check_sequence(manifest)
        path = self._obtain(manifest)
        self._commit(envelope, manifest)
        return LoadedRelease(manifest, path)

    def cached(self) -> Iterator[LoadedRelease]:
        """The cached releases that pass every check, newest first, for a start without a connection."""
        for name in (_CURRENT, _PREVIOUS):
            release = self._load(self.folder / name)
            if release is not None:
                yield release

    def adopt(self, release: LoadedRelease) -> None:
        """Make a cached release the current one, so that a poll returns only another one."""
        self._current = release.manifest

    def close(self) -> None:
        """Close the feed's connections."""
        self._feed.close()

    def _verify(self, envelope: str) -> ReleaseManifest:
        manifest = verify_manifest(envelope, self._trusted)
        if self._variant is not None and manifest.variant != self._variant:
            raise IntegrityError(
                f"The release is the variant {manifest.variant!r}, and {self._variant!r} was asked for.",
                cure=f"Ask for --variant {manifest.variant}, or take the release from elsewhere.",
            )
        return manifest

    def _is_at_hand(self, manifest: ReleaseManifest) -> bool:
        if self._current is None or manifest.sequence != self._current.sequence:
            return False
        if manifest != self._current:
            raise IntegrityError(f"There are two different releases with the sequence {manifest.sequence}.")
        return True

    def _check_sequence(self, manifest: ReleaseManifest) -> None:
        accepted = self._accepted()
        floor = max((accepted.get(key_id(key), 0) for key in self._trusted), default=0)
        if manifest.sequence < floor:
            raise IntegrityError(
                f"The release {manifest.version} has the sequence {manifest.sequence}; {floor} was accepted before.",
                cure="A rollback is released with a new, higher sequence; replaying an old release is refused.",
            )

    def _obtain(self, manifest: ReleaseManifest) -> Path:
        """The verified artifact on disk; downloaded unless it is cached (a rollback to a cached model)."""
        path = self._blob_path(manifest)
        if _is_intact(path, manifest):
            return path
        failure = self._failure
        if failure is None or failure[0] != manifest:
            self._backoff.reset()
        elif self._backoff.wait_s:
            # The traceback of one error would grow with every poll.
            raise failure[1].with_traceback(None)
        try:
            self._download(manifest, path)
        except FedvitError as error:
            self._backoff.failed()
            self._failure = (manifest, error)
            raise
        self._failure = None
        return path

    def _download(self, manifest: ReleaseManifest, path: Path) -> None:
        partial = self.folder / f"{manifest.artifact_digest}{_PARTIAL}"
        for other in self.folder.glob(f"*{_PARTIAL}"):
            if other != partial:
                other.unlink(missing_ok=True)
        with _explained(partial), partial.open("ab+") as file:
            if file.tell() > manifest.artifact_bytes:
                file.seek(0)
                file.truncate()
            self._check_room(manifest, file.tell())
            try:
                if file.tell() < manifest.artifact_bytes:
                    self._feed.fetch(manifest.artifact_digest, manifest.artifact_bytes, file)
                file.flush()
                self._check_content(manifest, file)
                Draft(partial, file).publish(path)
            except (OSError, IntegrityError):
                # On a full disk it takes the room that others need, and what is damaged is of no use.
                partial.unlink(missing_ok=True)
                raise

    def _check_room(self, manifest: ReleaseManifest, present: int) -> None:
        free, needed = shutil.disk_usage(self.folder).free, manifest.artifact_bytes - present
        if free < needed + _SPARE_BYTES:
            raise StateError(
                f"{self.folder} has {free:,} bytes free; {manifest.version} needs {needed + _SPARE_BYTES:,}.",
                cure="Make room on this disk, or name another folder with --cache.",
            )

    def _check_content(self, manifest: ReleaseManifest, file: BufferedRandom) -> None:
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if size != manifest.artifact_bytes or digest != manifest.artifact_digest:
            raise IntegrityError(
                f"The artifact of {manifest.version} has {size} bytes and SHA-256 {digest}; its manifest says "
                f"{manifest.artifact_bytes} bytes and {manifest.artifact_digest}."
            )

    def _commit(self, envelope: str, manifest: ReleaseManifest) -> None:
        accepted = self._accepted()
        # For every trusted key, so that neither the releases of an old key nor those of a new one can go back.
        accepted |= {key_id(key): manifest.sequence for key in self._trusted}
        _write(self.folder / _ACCEPTED, json.dumps(accepted, sort_keys=True).encode())
        current = self.folder / _CURRENT
        # Accepting the same release again must not replace the previous one.
        if current.exists() and current.read_bytes() != envelope.encode():
            _write(self.folder / _PREVIOUS, current.read_bytes())
        _write(current, envelope.encode())
        self._envelope, self._current = envelope, manifest
        self._prune()

    def _accepted(self) -> dict[str, int]:
        """The highest accepted sequence by key; keys that are no longer trusted do not count (key rotation)."""
        path = self.folder / _ACCEPTED
        with _explained(path):
            if not path.exists():
                return {}
            try:
                content = json.loads(path.read_bytes())
                return {str(key): int(sequence) for key, sequence in content.items()}
            except (ValueError, AttributeError, TypeError):
                raise StateError(
                    f"{path} is damaged; it is the memory that protects from old releases.",
                    cure="Delete the cache folder if this device may start anew with any release.",
                ) from None

    def _load(self, path: Path) -> LoadedRelease | None:
        try:
            manifest = self._verify(path.read_text(encoding="utf-8", errors="replace"))
        except (OSError, FedvitError):
            return None
        blob = self._blob_path(manifest)
        return LoadedRelease(manifest, blob) if _is_intact(blob, manifest) else None

    def _blob_path(self, manifest: ReleaseManifest) -> Path:
        return self.folder / f"{manifest.artifact_digest}.onnx"

    def _prune(self) -> None:
        keep = {release.model_path for release in self.cached()}
        for path in (*self.folder.glob("*.onnx"), *self.folder.glob(f"*{_PARTIAL}")):
            if path not in keep:
                path.unlink(missing_ok=True)


def write_release_folder(folder: Path, envelope: str, model_bytes: bytes) -> None:
    """Write a release as the folder that :class:`fedvit.registry.feed.FolderFeed` reads. The envelope comes last.

    Raises:
        StateError: the folder cannot be written.
    """
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write(folder / MODEL_FILE, model_bytes)
    _write(folder / ENVELOPE_FILE, envelope.encode())


def _is_intact(path: Path, manifest: ReleaseManifest) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != manifest.artifact_bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == manifest.artifact_digest
    except OSError:
        return False


def _write(path: Path, content: bytes) -> None:
    with _explained(path):
        write_atomically(path, content)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(f"{path} cannot be used: {error.strerror or error}.") from None
