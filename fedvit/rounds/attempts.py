"""Durable count of the attempts of a round under secure aggregation."""

from __future__ import annotations

from fedvit.store.store import Store
from fedvit.types import TrainTask

_ATTEMPTS_KEY = "secure_attempts"
"""Metadata key: the round that began a session last, and how many it has begun."""


class Attempts:
    """Durable count of the sessions that a round has begun.

    A session's noise is never used again: after it has begun, a repeated round is another attempt, which has other
    outputs and is charged again. A process that ends before repeats the same attempt.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def number(self, run_id: str, round_index: int) -> int:
        """How many sessions of the round have begun."""
        stored = self._store.metadata.get(_ATTEMPTS_KEY) or {}
        here = (stored.get("run_id"), stored.get("round_index")) == (run_id, round_index)
        return int(stored["begun"]) if here else 0

    def begin(self, task: TrainTask) -> None:
        """Note that the session of the task's attempt begins; durable when it returns."""
        place = {"run_id": task.run_id, "round_index": task.round_index, "begun": task.attempt + 1}
        self._store.metadata.set(_ATTEMPTS_KEY, place)
