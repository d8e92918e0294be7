"""Forensic bundle of an incident: an archive of audit trail, ledger, lineage, clients, tokens and settings."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from fedvit.atomic_write import draft_in
from fedvit.config import Settings
from fedvit.errors import IntegrityError
from fedvit.registry.contributions import contributions, versions_of_secure_sums
from fedvit.store.store import Store

MANIFEST = "manifest.json"
NOT_TOLD_APART = (
    "trained with secure aggregation. Their lineage names the clients in each sum; what a single client contributed "
    "was never seen, and contributions cannot be told apart."
)
_Parts = Mapping[str, Callable[[], Iterable[Mapping[str, Any]]]]


def bundle_path(home: Path, incident_id: str, at: datetime) -> Path:
    """The path of an incident's bundle; the incident's name is made safe for a file system."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", incident_id)[:80].strip("._-") or "incident"
    return home / "forensics" / f"{name}-{at:%Y%m%d-%H%M%S-%f}.tar.gz"


def write_bundle(store: Store, settings: Settings, path: Path, incident: Mapping[str, Any]) -> str:
    """Write the bundle with mode 0600 and return its SHA-256, hex.

    Every file but ``manifest.json`` is JSON lines; the manifest has the SHA-256 of each, and names the parts that could
    not be read: the other parts of a damaged state are still collected.

    Args:
        store: the store to collect from.
        settings: the settings of the running system.
        path: see :func:`bundle_path`.
        incident: the report and the actions taken, as JSON types, with ``affected_clients``.

    Raises:
        OSError: the archive cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        scratch = Path(folder)
        unreadable = _write_parts(scratch, _parts(store, settings, incident))
        files = sorted(scratch.iterdir())
        facts = {file.name: {"sha256": _sha256(file), "bytes": file.stat().st_size} for file in files}
        manifest = {"incident_id": incident["incident_id"], "files": facts, "unreadable": unreadable}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1))
        # The fastest level: the caller has a time limit, and JSON still compresses to a fifth.
        with draft_in(path.parent, 0o600) as draft:
            with tarfile.open(fileobj=draft.file, mode="w:gz", compresslevel=1) as archive:
                for file in (scratch / MANIFEST, *files):
                    archive.add(file, file.name)
            draft.publish(path)
    return _sha256(path)


def _parts(store: Store, settings: Settings, incident: Mapping[str, Any]) -> _Parts:
    affected = incident["affected_clients"]
    return {
        "incident.jsonl": lambda: [incident],
        "audit.jsonl": store.audit.lines,
        "ledger.jsonl": store.ledger.lines,
        "budget_periods.jsonl": store.budget.lines,
        "verification.jsonl": lambda: _verifications(store),
        "runs.jsonl": lambda: map(asdict, store.runs.all()),
        "versions.jsonl": lambda: map(asdict, store.versions.all()),
        "releases.jsonl": lambda: map(asdict, store.releases.all()),
        "contributions.jsonl": lambda: _contributions(store, set(affected)),
        "clients.jsonl": lambda: map(asdict, store.clients.all()),
        "tokens.jsonl": lambda: (
            {name: value for name, value in asdict(token).items() if name != "secret_hash"}
            for token in store.tokens.all()
        ),
        "settings.jsonl": lambda: [settings.model_dump(mode="json")],
    }


def _contributions(store: Store, affected: set[str]) -> Iterator[dict[str, Any]]:
    """For each version, the affected clients that contributed, and whether single contributions can be told apart."""
    secure = versions_of_secure_sums(store)
    for version, client_ids in contributions(store.versions.all(), affected).items():
        line = {"version": version, "affected_clients": sorted(client_ids), "secure_aggregation": version in secure}
        yield line | ({"note": NOT_TOLD_APART} if version in secure else {})


def _verifications(store: Store) -> Iterator[dict[str, Any]]:
    for name, verify in {"audit trail": store.audit.verify, "privacy ledger": store.ledger.verify}.items():
        try:
            yield {"chain": name, "intact": True, "lines": verify()}
        except IntegrityError as error:
            yield {"chain": name, "intact": False, "error": error.message, **error.details}


def _write_parts(folder: Path, parts: _Parts) -> dict[str, str]:
    """Write each part to a file of its name; return the errors of incomplete parts by name."""
    unreadable = {}
    for name, lines in parts.items():
        with (folder / name).open("w") as file:
            try:
                for line in lines():
                    file.write(json.dumps(line, default=str) + "\n")
            except OSError:
                raise
            except Exception as error:
                unreadable[name] = f"{type(error).__name__}: {error}"
    return unreadable


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
