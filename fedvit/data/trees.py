"""Read-only file trees: a folder, a zip, or several zips together.

A tree is pickled as paths and names; every process opens its own zip handles.
"""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedvit.atomic_write import is_unicode
from fedvit.errors import DataError
from fedvit.wire.images import IMAGE_SUFFIXES

SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "#snapshot", "@Recycle", "$RECYCLE.BIN", "System Volume Information"}
)
"""Folders of thumbnails, deleted files and the like; those of macOS and Linux begin with a dot."""


class FileTree(Protocol):
    """Named files. Names are relative, with ``/`` between folders; the name of a folder ends with ``/``."""

    @property
    def names(self) -> frozenset[str]:
        """Every file and folder, without hidden ones."""

    @property
    def hidden(self) -> frozenset[str]:
        """Files and folders of editors, operating systems and network storage."""

    def read(self, name: str) -> bytes:
        """The bytes of one file.

        Raises:
            DataError: it is missing, unreadable or damaged.
        """


@dataclass(frozen=True, slots=True)
class FolderTree:
    """The files below one folder; symbolic links are followed."""

    root: Path
    names: frozenset[str]
    hidden: frozenset[str] = frozenset()

    @classmethod
    def open(cls, root: Path) -> FolderTree:
        """List ``root`` without reading any file.

        Raises:
            DataError: a name is not valid UTF-8.
        """
        names = _walk(root)
        for name in sorted(names):
            if not is_unicode(name):
                shown = os.fsencode(name).decode(errors="backslashreplace")
                raise DataError(
                    f"The name {shown} in {root} is not valid UTF-8.",
                    cure="Rename it; `convmv -f latin1 -t utf8 -r --notest` renames a whole folder.",
                )
        return cls(root, *_sorted_out(names))

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            message = f"{self.root / name} cannot be read: {error.strerror}."
            raise DataError(message, cure="Restore the file or mend its rights.") from None

    def __str__(self) -> str:
        return str(self.root)


def _walk(root: Path) -> list[str]:
    names: list[str] = []
    above: dict[str, frozenset[str]] = {}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        # A link to a parent folder would never end.
        real, ancestors = os.path.realpath(folder), above.get(os.path.dirname(folder), frozenset())
        if real in ancestors:
            subfolders.clear()
            continue
        above[folder] = ancestors | {real}
        base = Path(folder).relative_to(root).as_posix()
        prefix = "" if base == "." else f"{base}/"
        names += [f"{prefix}{name}/" for name in subfolders] + [f"{prefix}{name}" for name in files]
    return names


def _sorted_out(names: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The visible and the hidden ones among ``names``."""
    every = frozenset(names)
    hidden = frozenset(n for n in every if any(p.startswith(".") or p in SYSTEM_FOLDERS for p in n.split("/")))
    return every - hidden, hidden


@dataclass(slots=True)
class ZipTree:
    """The files in one zip."""

    path: Path
    names: frozenset[str]
    hidden: frozenset[str] = frozenset()
    _local: threading.local = field(default_factory=threading.local, compare=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> ZipTree:
        """List the zip at ``path``.

        Raises:
            DataError: it is no zip, or its directory is damaged.
        """
        tree = cls(path, frozenset())
        names = [info.filename for info in tree._handle().infolist()]
        folders = {name[: i + 1] for name in names for i, letter in enumerate(name) if letter == "/"}
        tree.names, tree.hidden = _sorted_out((*names, *folders))
        return tree

    def read(self, name: str) -> bytes:
        try:
            return self._handle().read(name)
        except (KeyError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            message = f"{name} in {self.path} cannot be read: {error}."
            raise DataError(message, cure="Fetch or build the zip again.") from None

    def _handle(self) -> zipfile.ZipFile:
        # A handle inherited by a forked child would share its file offset.
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.file = _open_zip(self.path)
            self._local.pid = os.getpid()
        handle: zipfile.ZipFile = self._local.file
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "names": self.names, "hidden": self.hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.names, self.hidden = state["path"], state["names"], state["hidden"]
        self._local = threading.local()

    def __str__(self) -> str:
        return str(self.path)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        cure = "Fetch it again, or unpack it and name the folder."
        raise DataError(f"{path} is no readable zip: {error}.", cure=cure) from None


@dataclass(frozen=True, slots=True)
class JoinedTree:
    """Several trees as one; if two have the same name, the earlier one is used."""

    trees: tuple[FileTree, ...]
    names: frozenset[str]
    hidden: frozenset[str] = frozenset()

    @classmethod
    def of(cls, trees: Sequence[FileTree]) -> JoinedTree:
        names, hidden = ([getattr(tree, field) for tree in trees] for field in ("names", "hidden"))
        return cls(tuple(trees), frozenset().union(*names), frozenset().union(*hidden))

    def read(self, name: str) -> bytes:
        for tree in self.trees:
            if name in tree.names:
                return tree.read(name)
        raise DataError(f"{name} is in none of {self}.", cure="Restore the file.")

    def __str__(self) -> str:
        return ", ".join(str(tree) for tree in self.trees)


def open_tree(path: Path) -> FileTree:
    """The folder or the zip at ``path``.

    Raises:
        DataError: there is neither.
    """
    if path.is_dir():
        return FolderTree.open(path)
    if path.exists():
        return ZipTree.open(path)
    raise DataError(f"There is no {path}.", cure="Set data.path to an existing folder or zip.")


def prefix_before(names: frozenset[str], landmark: str) -> str | None:
    """Prefix of the topmost folder ``landmark`` (``"a/"`` or ``"a/b/"``) in ``names``; None if there is none."""
    prefixes = (name.removesuffix(landmark) for name in names if f"/{name}".endswith(f"/{landmark}"))
    return min(prefixes, key=lambda prefix: (prefix.count("/"), prefix), default=None)


def subfolders(tree: FileTree, parent: str) -> tuple[str, ...]:
    """Names of the folders directly below ``parent``, sorted."""
    below = (name[len(parent) : -1] for name in tree.names if name.endswith("/") and name.startswith(parent))
    return tuple(sorted(name for name in below if name and "/" not in name))


def images_below(tree: FileTree, parent: str) -> list[str]:
    """Names of the images at any depth below ``parent``, sorted."""
    return sorted(n for n in tree.names if n.startswith(parent) and n.lower().endswith(IMAGE_SUFFIXES))


def images_in(tree: FileTree, parent: str) -> list[str]:
    """Names of the images directly in ``parent``, sorted."""
    return [name for name in images_below(tree, parent) if "/" not in name[len(parent) :]]
