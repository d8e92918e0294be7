"""What an operator steers training with, kept in the store: which run, how patient a round is, and whom it waits for.

A run is identified by its settings; an order on top of them makes it another run, also when the settings are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fedvit.config import Settings
from fedvit.errors import StaleRequestError
from fedvit.store.store import Store

_ORDER_KEY = "run_request"
_ROUND_KEY = "round_settings"
_AGGREGATION_KEY = "aggregation_settings"
STALENESS_TOLERANCE = 5


@dataclass(frozen=True, slots=True)
class RunRequest:
    """An operator's wish for a new run. ``base_version`` None starts from the base weights.

    ``client_selection`` stays in force for later orders that say nothing of it; None leaves it to the settings.
    """

    number: int
    operation_id: str
    reason: str
    base_version: str | None = None
    client_selection: str | None = None


def run_request(store: Store) -> RunRequest | None:
    """The order in force, if there ever was one."""
    found = store.metadata.get(_ORDER_KEY)
    return None if found is None else RunRequest(**found)


def place_run_request(store: Store, wish: RunRequest) -> RunRequest:
    """Put ``wish`` in force under the next number; the same operation places one order, however often it tries."""
    with store.transaction() as transaction:
        value = transaction.metadata.get(_ORDER_KEY)
        before = RunRequest(**value) if value else None
        if before is not None and before.operation_id == wish.operation_id:
            return before
        selection = wish.client_selection or (before.client_selection if before else None)
        request = replace(wish, number=before.number + 1 if before else 1, client_selection=selection)
        transaction.metadata.set(_ORDER_KEY, asdict(request))
        return request


def run_identity(settings: Settings, order: RunRequest | None) -> tuple[dict[str, Any], str]:
    """What a run is recorded with, and its SHA-256, hex; without an order, those of the settings alone."""
    if order is None:
        return settings.training_identity(), settings.training_digest()
    named = {"settings": settings.training_digest(), "order": asdict(order)}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    return {**settings.training_identity(), "order": asdict(order)}, digest


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """What the next round goes by: the fewest clients, and how long a silent proxy is waited for.

    ``revision`` counts the changes; 0 is what the settings say.
    """

    revision: int
    min_clients: int
    wait_timeout_s: float


def round_settings(store: Store, settings: Settings) -> RoundSettings:
    """What is in force now."""
    return _round_settings(store.metadata.get(_ROUND_KEY), settings)


def change_round_settings(
    store: Store,
    settings: Settings,
    *,
    min_clients: int | None = None,
    wait_timeout_s: float | None = None,
    expected_revisions: Collection[int] | None = None,
) -> RoundSettings:
    """Change what is not None, durably; the next round goes by it.

    Raises:
        StaleRequestError: ``expected_revisions`` are given and the present one is not among them.
    """
    with store.transaction() as transaction:
        now = _round_settings(transaction.metadata.get(_ROUND_KEY), settings)
        _check_revision("training configuration", now.revision, expected_revisions)
        wanted = replace(
            now,
            min_clients=now.min_clients if min_clients is None else min_clients,
            wait_timeout_s=now.wait_timeout_s if wait_timeout_s is None else wait_timeout_s,
        )
        changed = now if wanted == now else replace(wanted, revision=now.revision + 1)
        transaction.metadata.set(_ROUND_KEY, asdict(changed))
        return changed


@dataclass(frozen=True, slots=True)
class AggregationSettings:
    """Whom a round waits for: all that are in flight, or, asynchronous, the first ``buffer_size`` updates.

    An update that is more than ``staleness_tolerance`` versions late is refused, in either mode. ``buffer_size`` None
    is half of those who take part. ``revision`` counts the changes; 0 is synchronous.
    """

    revision: int = 0
    mode: Literal["synchronous", "asynchronous"] = "synchronous"
    staleness_tolerance: int = STALENESS_TOLERANCE
    buffer_size: int | None = None

    def enough(self, taking_part: int, min_clients: int) -> int | None:
        """How many updates a round commits with, out of ``taking_part`` clients; None waits for all of them."""
        if self.mode == "synchronous":
            return None
        wanted = -(-taking_part // 2) if self.buffer_size is None else self.buffer_size
        return max(min_clients, min(wanted, taking_part))


def aggregation_settings(store: Store) -> AggregationSettings:
    """What is in force now."""
    return AggregationSettings(**store.metadata.get(_AGGREGATION_KEY) or {})


def begin_in_initial_mode(store: Store, settings: Settings) -> AggregationSettings:
    """Put ``training.initial_mode`` in force where nobody has ever set a mode."""
    wanted = settings.training.initial_mode

    def wish(now: AggregationSettings) -> AggregationSettings:
        return replace(now, **wanted.model_dump()) if now.revision == 0 else now

    return change_aggregation_settings(store, wish)


def change_aggregation_settings(
    store: Store,
    wish: Callable[[AggregationSettings], AggregationSettings],
    *,
    expected_revisions: Collection[int] | None = None,
) -> AggregationSettings:
    """Change them durably into what ``wish`` makes of those in force; the round under way goes by it as well.

    Raises:
        StaleRequestError: ``expected_revisions`` are given and the present one is not among them.
    """
    with store.transaction() as transaction:
        now = AggregationSettings(**transaction.metadata.get(_AGGREGATION_KEY) or {})
        _check_revision("aggregation mode", now.revision, expected_revisions)
        wanted = wish(now)
        changed = now if wanted == now else replace(wanted, revision=now.revision + 1)
        transaction.metadata.set(_AGGREGATION_KEY, asdict(changed))
        return changed


def _check_revision(what: str, revision: int, expected: Collection[int] | None) -> None:
    if expected is not None and revision not in expected:
        raise StaleRequestError(
            f"The {what} was changed meanwhile; it has the revision {revision}.",
            cure="Read it again and repeat the change with its ETag.",
        )


def _round_settings(found: Any | None, settings: Settings) -> RoundSettings:
    if found is not None:
        return RoundSettings(**found)
    training = settings.training
    return RoundSettings(0, training.cohort.min_clients, training.round_timeout_s)
