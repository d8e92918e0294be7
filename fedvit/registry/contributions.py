"""Contributions of clients to model versions, including those through earlier versions."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fedvit.store.records import Release
from fedvit.store.store import Store
from fedvit.types import ModelVersion


def contributions(versions: Iterable[ModelVersion], client_ids: Collection[str]) -> dict[str, frozenset[str]]:
    """Which of these clients contributed to each version.

    A round's weights contain the contributions to all earlier rounds of its run, to the version that the run began
    from, and so on. A version made from another one (a roll-back, an optimisation) contains the same as that one.

    Args:
        versions: all versions of a store, newest first.
        client_ids: the clients to look for; the result contains no others.
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
        contributors = earlier | wanted.intersection(version.lineage["clients"])
        by_version[version.version] = by_run[version.run_id] = contributors
    return by_version


def versions_of_secure_sums(store: Store) -> frozenset[str]:
    """The versions that contain sums of secure aggregation: their lineage says who was in a sum, not who gave what."""
    secure_runs = {
        run.run_id for run in store.runs.all() if run.config.get("privacy", {}).get("noise_at") == "distributed"
    }
    found: set[str] = set()
    for version in reversed(store.versions.all()):
        # A derived version is numbered with the latest run, which need not be its own.
        own = version.run_id in secure_runs and version.derived_from is None
        if own or found.intersection((version.derived_from, version.lineage.get("base_version"))):
            found.add(version.version)
    return frozenset(found)


def last_release_without(store: Store, client_ids: Collection[str]) -> Release | None:
    """The newest release to which none of these clients contributed, or None."""
    contributors = contributions(store.versions.all(), client_ids)
    return next((release for release in reversed(store.releases.all()) if not contributors[release.version]), None)
