"""The last error of a run in code that fedvit called: of a client, an evaluation or an aggregation rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fedvit.store.store import Store

_KEY = "last_failure"


@dataclass(frozen=True, slots=True)
class Failure:
    """An error and its traceback. ``client_id`` is None where it was no client's."""

    run_id: str
    round_index: int
    client_id: str | None
    error: str
    traceback: str


def record_failure(store: Store, failure: Failure) -> None:
    """Keep this failure in the place of the last one."""
    store.metadata.set(_KEY, asdict(failure))


def last_failure(store: Store, run_id: str | None) -> Failure | None:
    """The last failure, if it was in this run."""
    value = store.metadata.get(_KEY)
    return Failure(**value) if value and value["run_id"] == run_id else None
