"""A folder that several machines can reach: on a file system, or in an object store behind an fsspec URL.

Folders on a file system need no further package.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from fedvit.atomic_write import write_atomically
from fedvit.errors import ConfigError, DataError, NotFoundError

FILE_SCHEME = "file://"


class Folder(Protocol):
    """Files by relative path, ``a/b``. The caller makes sure that no part of a path leads out of the folder.

    Any method raises OSError where the folder cannot be reached.
    """

    def folders(self, path: str) -> list[str]:
        """Names of the folders in ``path``, sorted; none where it is missing."""

    def files(self, path: str) -> list[str]:
        """Names of the finished files in ``path``, sorted; none where it is missing."""

    def read(self, path: str, max_bytes: int) -> bytes:
        """The content of a file.

        Raises:
            NotFoundError: no such file.
            DataError: it is larger than ``max_bytes``, or no plain file.
        """

    def write(self, path: str, content: bytes) -> None:
        """Write a file so that a reader sees all of it or nothing; an older one is replaced."""

    def move(self, path: str, target: str) -> None:
        """Move a file; an older one at ``target`` is replaced. Harmless where it is gone already."""

    def remove(self, path: str) -> None:
        """Remove a file; harmless where it is gone already, or is a folder."""


def open_folder(url: str) -> Folder:
    """The folder behind a path, or behind an fsspec URL such as ``s3://bucket/folder``.

    Raises:
        ConfigError: the package that the URL needs is missing, or the URL's scheme is unknown.
    """
    if url.startswith(FILE_SCHEME) or "://" not in url:
        return LocalFolder(Path(url.removeprefix(FILE_SCHEME)))
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"The folder {url} cannot be opened: {error}.", cure="Install the package, or name a plain folder."
        ) from None
    return RemoteFolder(system, root)


class LocalFolder:
    """A folder on a file system. Links in it are not followed, because others may write to it, too: a file behind a
    linked folder cannot be reached, which raises OSError."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folders(self, path: str) -> list[str]:
        return self._names(path, folders=True)

    def files(self, path: str) -> list[str]:
        return self._names(path, folders=False)

    def read(self, path: str, max_bytes: int) -> bytes:
        try:
            # Non-blocking, so that a pipe in the place of a file does not block.
            handle = os.open(self._at(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise NotFoundError(f"There is no file {path}.") from None
        except OSError as error:
            raise DataError(f"{path} is no plain file: {error.strerror}.") from None
        with open(handle, "rb") as file:
            content = file.read(max_bytes + 1)
        return _bounded(path, content or b"", max_bytes)

    def write(self, path: str, content: bytes) -> None:
        write_atomically(self._at(path), content)

    def move(self, path: str, target: str) -> None:
        place = self._at(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.replace(self._at(path), place)

    def remove(self, path: str) -> None:
        with suppress(IsADirectoryError):
            self._at(path).unlink(missing_ok=True)

    def _at(self, path: str) -> Path:
        """The place of a file, if no folder on the way to it is a link."""
        place = self._root
        for part in path.split("/")[:-1]:
            place /= part
            if place.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(place))
        return self._root / path

    def _names(self, path: str, *, folders: bool) -> list[str]:
        try:
            with os.scandir(self._at(f"{path}/")) as entries:
                # Drafts begin with a dot. A link counts as a file, so that it can be refused by name.
                return sorted(
                    entry.name
                    for entry in entries
                    if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False) == folders
                )
        except FileNotFoundError:
            return []


class RemoteFolder:
    """A folder in an object store, through fsspec: it has no links, and writes are atomic."""

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root.rstrip("/")

    def folders(self, path: str) -> list[str]:
        return self._names(path, "directory")

    def files(self, path: str) -> list[str]:
        return self._names(path, "file")

    def read(self, path: str, max_bytes: int) -> bytes:
        try:
            with _as_os_error():
                content = self._system.cat_file(self._at(path), start=0, end=max_bytes + 1)
        except FileNotFoundError:
            raise NotFoundError(f"There is no file {path}.") from None
        return _bounded(path, content, max_bytes)

    def write(self, path: str, content: bytes) -> None:
        with _as_os_error():
            self._make_room(path)
            self._system.pipe_file(self._at(path), content)

    def move(self, path: str, target: str) -> None:
        with suppress(FileNotFoundError), _as_os_error():
            self._make_room(target)
            self._system.mv(self._at(path), self._at(target))

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError), _as_os_error():
            self._system.rm_file(self._at(path))

    def _make_room(self, path: str) -> None:
        self._system.makedirs(self._at(path).rsplit("/", 1)[0], exist_ok=True)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _names(self, path: str, kind: str) -> list[str]:
        entries: list[dict[str, Any]] = []
        with suppress(FileNotFoundError), _as_os_error():
            self._system.invalidate_cache()
            entries = self._system.ls(self._at(path), detail=True)
        names = (str(entry["name"]).rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == kind)
        return sorted(name for name in names if not name.startswith("."))


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn the specific errors of object stores into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _bounded(path: str, content: bytes, max_bytes: int) -> bytes:
    if len(content) > max_bytes:
        raise DataError(f"{path} is larger than {max_bytes} bytes.")
    return content
