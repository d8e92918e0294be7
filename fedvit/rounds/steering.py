"""Settings that an operator changes while training runs: the run request, the limits of a round, the aggregation mode.

They are stored. A run is identified by its settings and its run request: a new request makes another run, even if the
settings are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from fedvit.config import Settings
from fedvit.errors import StaleRequestError
from fedvit.store.store import Store

_REQUEST_KEY = "run_request"
_ROUND_KEY = "round_settings"
_AGGREGATION_KEY = "aggregation_settings"
_SECTIONS = ("model", "training", "privacy", "secure_aggregation", "workload", "order")
STALENESS_TOLERANCE = 5
_Changeable = TypeVar("_Changeable", "RoundSettings", "AggregationSettings")


@dataclass(frozen=True, slots=True)
class RunRequest:
    """An operator's request for a new run. ``base_version`` None starts from the base weights.

    ``client_selection`` stays in force for later requests without one; None leaves it to the settings.
    """

    number: int
    operation_id: str
    reason: str
    base_version: str | None = None
    client_selection: str | None = None


def run_request(store: Store) -> RunRequest | None:
    """The request in force, if there is one."""
    value = store.metadata.get(_REQUEST_KEY)
    return None if value is None else RunRequest(**value)


def place_run_request(store: Store, new: RunRequest) -> RunRequest:
    """Put a request in force under the next number; an operation that repeats its request places it once."""
    with store.transaction() as transaction:
        value = transaction.metadata.get(_REQUEST_KEY)
        before = RunRequest(**value) if value else None
        if before is not None and before.operation_id == new.operation_id:
            return before
        selection = new.client_selection or (before.client_selection if before else None)
        request = replace(new, number=before.number + 1 if before else 1, client_selection=selection)
        transaction.metadata.set(_REQUEST_KEY, asdict(request))
        return request


def run_identity(settings: Settings, request: RunRequest | None) -> tuple[dict[str, Any], str]:
    """The recorded configuration of a run, and its SHA-256, hex."""
    if request is None:
        return settings.training_identity(), settings.training_digest()
    named = {"settings": settings.training_digest(), "order": asdict(request)}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    return {**settings.training_identity(), "order": asdict(request)}, digest


def changed_settings(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """The names of the settings that differ between a run's recorded configuration and an identity; empty if none."""
    # What is recorded beside the settings follows from the fleet.
    before, after = (_named({section: config.get(section) for section in _SECTIONS}) for config in (recorded, identity))
    return ", ".join(sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)))


def _named(value: Any, name: str = "") -> dict[str, Any]:
    """The values in nested mappings, by dotted name."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in _named(part, f"{name}.{key}" if name else str(key)).items()}


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """Limits of the next round: the fewest clients, and how long a silent proxy is waited for.

    ``revision`` counts the changes; 0 stands for the settings.
    """

    revision: int
    min_clients: int
    wait_timeout_s: float


def round_settings(store: Store, settings: Settings) -> RoundSettings:
    """The settings in force."""
    return _round_settings(store.metadata.get(_ROUND_KEY), settings)


def change_round_settings(
    store: Store,
    settings: Settings,
    *,
    min_clients: int | None = None,
    wait_timeout_s: float | None = None,
    expected_revisions: Collection[int] | None = None,
) -> RoundSettings:
    """Change what is not None, durably, from the next round on.

    Raises:
        StaleRequestError: ``expected_revisions`` are given and the present one is not among them.
    """

    def wish(now: RoundSettings) -> RoundSettings:
        fewest = now.min_clients if min_clients is None else min_clients
        return RoundSettings(now.revision, fewest, now.wait_timeout_s if wait_timeout_s is None else wait_timeout_s)

    def read(value: Any | None) -> RoundSettings:
        return _round_settings(value, settings)

    return _change(store, _ROUND_KEY, "training configuration", read, wish, expected_revisions)


@dataclass(frozen=True, slots=True)
class AggregationSettings:
    """How many updates complete a round: those of all clients in flight, or, asynchronous, the first ``buffer_size``.

    An update that is more than ``staleness_tolerance`` versions late is rejected, in either mode. ``buffer_size`` None
    is half of the clients that take part. ``revision`` counts the changes; 0 is synchronous.
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
    """The settings in force."""
    return _aggregation_settings(store.metadata.get(_AGGREGATION_KEY))


def begin_in_initial_mode(store: Store, settings: Settings) -> AggregationSettings:
    """Put ``training.initial_mode`` in force where no mode was ever set."""
    wanted = settings.training.initial_mode.model_dump()
    return change_aggregation_settings(store, lambda now: now if now.revision else replace(now, **wanted))


def change_aggregation_settings(
    store: Store,
    wish: Callable[[AggregationSettings], AggregationSettings],
    *,
    expected_revisions: Collection[int] | None = None,
) -> AggregationSettings:
    """Change them durably into what ``wish`` makes of those in force; they hold for the round under way, too.

    Raises:
        StaleRequestError: ``expected_revisions`` are given and the present one is not among them.
    """
    return _change(store, _AGGREGATION_KEY, "aggregation mode", _aggregation_settings, wish, expected_revisions)


def _change(
    store: Store,
    key: str,
    name: str,
    read: Callable[[Any | None], _Changeable],
    wish: Callable[[_Changeable], _Changeable],
    expected_revisions: Collection[int] | None,
) -> _Changeable:
    with store.transaction() as transaction:
        now = read(transaction.metadata.get(key))
        if expected_revisions is not None and now.revision not in expected_revisions:
            raise StaleRequestError(
                f"The {name} was changed meanwhile; it has the revision {now.revision}.",
                cure="Read it again and repeat the change with its ETag.",
            )
        wanted = wish(now)
        changed = now if wanted == now else replace(wanted, revision=now.revision + 1)
        transaction.metadata.set(key, asdict(changed))
        return changed


def _aggregation_settings(value: Any | None) -> AggregationSettings:
    return AggregationSettings(**value or {})


def _round_settings(value: Any | None, settings: Settings) -> RoundSettings:
    if value is not None:
        return RoundSettings(**value)
    return RoundSettings(0, settings.training.cohort.min_clients, settings.training.round_timeout_s)
