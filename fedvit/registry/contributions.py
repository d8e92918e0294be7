"""Whose updates are in the weights of a model version, also by way of the versions that it was made from."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fedvit.store.records import Release
from fedvit.store.store import Store
from fedvit.types import ModelVersion


def contributions(versions: Iterable[ModelVersion], client_ids: Collection[str]) -> dict[str, frozenset[str]]:
    """Which of these clients contributed to each version.

    A round's weights carry all earlier rounds of its run, those of the version that the run began from, and so on; a
    version made from another one (a roll-back, an optimisation) carries what that one does.

    Args:
        versions: all versions of a store, newest first.
        client_ids: whom to look for; only they are in the answer.
    """
    wanted = frozenset(client_ids)
    by_version: dict[str, frozenset[str]] = {}
    by_run: dict[str, frozenset[str]] = {}
    for version in reversed(list(versions)):
        if version.derived_from is not None:
            by_version[version.version] = by_version[version.derived_from]
            continue
        base = version.lineage.get("base_version")
        earlier = by_run.get(version.run_id, by_version[base] if base else frozenset())
        found = earlier | wanted.intersection(version.lineage["clients"])
        by_version[version.version] = by_run[version.run_id] = found
    return by_version


def last_release_without(store: Store, client_ids: Collection[str]) -> Release | None:
    """The newest release to which none of these clients contributed, or None."""
    found = contributions(store.versions.all(), client_ids)
    return next((release for release in reversed(store.releases.all()) if not found[release.version]), None)
