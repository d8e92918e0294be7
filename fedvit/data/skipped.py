"""Files of a data set that are not read as images, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath

from fedvit.data.records import ImageSource, TreeSource
from fedvit.data.trees import FileTree
from fedvit.wire.images import FORMATS, IMAGE_SUFFIXES

# Image formats that the decoder does not read; see fedvit.wire.images.FORMATS.
UNREAD_SUFFIXES = frozenset(
    {".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".tga", ".svg", ".dcm"}
)
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class SkippedFiles:
    """Files that are left out for one reason; ``examples`` are the first of their names in the tree."""

    reason: str
    files: int
    examples: tuple[str, ...]


def skipped_files(source: ImageSource) -> list[SkippedFiles]:
    """The files that are left out, by reason, sorted by it; none of a source that does not consist of files."""
    if not isinstance(source, TreeSource):
        return []
    used = {source.file_of(record) for record in (*source.train, *source.test)}
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name in sorted(source.tree.names | source.tree.hidden):
        if not name.endswith("/") and name not in used:
            by_reason[_reason(source, name)].append(name)
    return [SkippedFiles(reason, len(names), tuple(names[:_EXAMPLES])) for reason, names in sorted(by_reason.items())]


def unread_images(tree: FileTree, folder: str) -> str:
    """The images that the decoder does not read below a folder, as the end of a sentence; "" if there are none."""
    suffixes = Counter(_suffix(name) for name in tree.names if name.startswith(folder))
    found = [f"{count} {suffix}" for suffix, count in sorted(suffixes.items()) if suffix in UNREAD_SUFFIXES]
    if not found:
        return ""
    return f" that can be read, but {', '.join(found)} files; convert them to one of {', '.join(FORMATS)}"


def _reason(source: TreeSource, name: str) -> str:
    suffix = _suffix(name)
    if name in source.tree.hidden:
        return "hidden, or in a folder of the operating system such as @eaDir"
    if suffix in UNREAD_SUFFIXES:
        return f"{suffix} is not read: convert to one of {', '.join(FORMATS)}"
    if suffix not in IMAGE_SUFFIXES:
        return "not an image, by its suffix"
    if any(name.startswith(place) for _, place in source.folders):
        return "beside the class folders"
    return "outside of the splits that are used"


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
