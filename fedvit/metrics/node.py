"""Merged metrics of all processes of one node, ended processes included.

Each process writes its own files (``prometheus_client``'s multiprocess mode), which remain when it ends. Files of ended
processes are folded into one for each type: counters and histograms as sums, gauges by their newest value. So no count
is lost or doubled by restarts, and the folder stays small. The series of a release are in files of their own (see
:mod:`fedvit.metrics.releases`), which are removed when no process serves it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from fedvit.atomic_write import write_atomically
from fedvit.metrics.catalogue import PREFIX

LOCK = ".lock"
JOURNAL = "folding.json"
ENDED = "ended"
_OF_PROCESS = re.compile(r"(?P<kind>counter|histogram|summary|gauge_[a-z]+)_(?P<pid>\d+)\.db")
_OF_RELEASE = re.compile(r"(?P<kind>counter|histogram)_(?P<owner>[0-9a-f]+|ended)r(?P<sequence>\d+)\.db")
_Values = dict[str, tuple[float, float]]


def release_file(kind: str, owner: str, sequence: int) -> str:
    """Name of the file of one process for one release."""
    return f"{kind}_{owner}r{sequence}.db"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclusive access to the folder: one process at a time creates, folds or reads files."""
    with (folder / LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class NodeCollector(Collector):
    """Collects the metrics in ``folder`` of all processes of a node, and folds the files of ended ones.

    Raises:
        ValueError: ``folder`` is not a folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a directory")
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """The merged metrics, as of now."""
        with locked(self._folder):
            tidy(self._folder)
            files = [str(path) for path in sorted(self._folder.glob("*.db"))]
            merged = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        # Ray's own processes have the variable in their environment, too.
        return [family for family in merged if family.name.startswith(PREFIX)]


def tidy(folder: Path) -> None:
    """Fold the files of ended processes and remove those of retired releases; the caller holds the lock."""
    _finish_folding(folder)
    ended = defaultdict(list)
    for path in sorted(folder.glob("*.db")):
        match = _OF_PROCESS.fullmatch(path.name)
        if match and not _lives(int(match["pid"])):
            if match["kind"].startswith("gauge_live"):
                path.unlink()
            else:
                ended[f"{match['kind']}_{ENDED}.db"].append(path)
    for archive, paths in (ended | _of_releases(folder)).items():
        _fold(folder / archive, paths)


def _of_releases(folder: Path) -> dict[str, list[Path]]:
    """Files of ended processes for releases that serve, by archive; those for other releases are removed."""
    files = [(path, match) for path in folder.glob("*.db") if (match := _OF_RELEASE.fullmatch(path.name))]
    served = {match["sequence"] for path, match in files if _is_held(path)}
    ended = defaultdict(list)
    for path, match in sorted(files, key=lambda file: file[0]):
        if _is_held(path):
            continue
        # Without any living replica it is unknown which releases are retired.
        if served and match["sequence"] not in served:
            path.unlink()
        elif match["owner"] != ENDED:
            ended[release_file(match["kind"], ENDED, int(match["sequence"]))].append(path)
    return ended


def _fold(archive: Path, paths: list[Path]) -> None:
    values: _Values = {}
    newest = archive.name.startswith("gauge")
    for path in [archive, *paths] if archive.exists() else paths:
        for key, value, at, _ in MmapedDict.read_all_values_from_file(str(path)):  # type: ignore[no-untyped-call]
            known, then = values.get(key, (0.0, 0.0))
            values[key] = max((then, known), (at, value))[::-1] if newest else (known + value, 0.0)
    draft = archive.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    _write(draft, values)
    journal = archive.with_name(JOURNAL)
    entry = {"archive": archive.name, "draft": draft.name, "ended": [path.name for path in paths]}
    # From here on any process completes the folding, so a kill neither loses nor doubles a count. It is not durable:
    # after a power cut the metrics begin anew, and their mapped files are not flushed either.
    write_atomically(journal, json.dumps(entry), durable=False)
    _finish_folding(archive.parent)


def _finish_folding(folder: Path) -> None:
    journal = folder / JOURNAL
    if not journal.exists():
        return
    entry = json.loads(journal.read_text())
    draft = folder / entry["draft"]
    if draft.exists():
        draft.replace(folder / entry["archive"])
    for name in entry["ended"]:
        (folder / name).unlink(missing_ok=True)
    journal.unlink()


def _write(path: Path, values: _Values) -> None:
    file = MmapedDict(str(path))  # type: ignore[no-untyped-call]
    for key, (value, at) in values.items():
        file.write_value(key, value, at)  # type: ignore[no-untyped-call]
    file.close()  # type: ignore[no-untyped-call]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_held(path: Path) -> bool:
    """Whether the process that made the file lives; unlike its id, its lock is never reused."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
