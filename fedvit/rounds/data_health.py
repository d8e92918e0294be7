"""What is known of the fleet's data at this moment, read from the store; and the verdicts that follow from it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass

from fedvit.drift import quality
from fedvit.drift.comparison import Comparison, compare
from fedvit.drift.quality import Concern, FleetQuality, ValidationStreak
from fedvit.drift.signals import DriftReport, Signal, histogram_signals, loss_signal
from fedvit.errors import FedvitError
from fedvit.ports import ClockPort
from fedvit.store.records import ClientValidation
from fedvit.store.store import Store
from fedvit.types import ClientOutcome, ModelVersion
from fedvit.wire.histograms import ClientHistogram, HistogramSpec

_LOG = logging.getLogger(__name__)
_STANDING = "standing"
_COUNTED = 20_000


@dataclass(frozen=True, slots=True)
class FleetHistograms:
    """Each client's newest histogram, what it means, and how it compares with the reference of what is released."""

    newest: Mapping[str, ClientHistogram]
    spec: HistogramSpec | None
    comparison: Comparison | None


def histograms(store: Store) -> FleetHistograms:
    """Read them.

    The reference is what every client had told when the released model was trained: a roll-back brings the window of
    the older model back with it.
    """
    newest, release = store.histograms.latest(), store.releases.current()
    if not newest:
        return FleetHistograms({}, None, None)
    # Another data set or model has other edges; what most have told last is what is looked at.
    digest, _ = Counter(histogram.spec_digest for histogram in newest.values()).most_common(1)[0]
    spec = store.histograms.spec(digest)
    if release is None or spec is None:
        return FleetHistograms(newest, spec, None)
    reference = store.histograms.latest(until=_trained(store, release.version).created_at)
    meant = {
        digest: store.histograms.spec(digest) for digest in {histogram.spec_digest for histogram in reference.values()}
    }
    same_basis = {digest for digest, told in meant.items() if told is not None and told.basis == spec.basis}
    return FleetHistograms(newest, spec, compare(reference, newest, spec, same_basis))


def reference_spec(store: Store) -> HistogramSpec | None:
    """What the latest histograms of the reference mean; None where there are none."""
    release = store.releases.current()
    return None if release is None else store.histograms.latest_spec(_trained(store, release.version).created_at)


def doubts(store: Store, told: FleetHistograms) -> dict[str, list[Concern]]:
    """What was seen of clients' data that speaks against them."""
    statistics = store.rounds.update_statistics(quality.STATISTICS_ROUNDS)
    return quality.concerns_by_client(statistics, told.newest, told.spec, told.comparison)


def drift(store: Store, told: FleetHistograms, *others: Signal) -> DriftReport:
    """The held-out loss of the latest run, whatever ``others`` know, and what clients' histograms say."""
    run = store.runs.latest()
    rounds = store.rounds.of_run(run.run_id) if run else []
    losses = [found.loss for found in rounds if found.committed and found.loss is not None]
    return DriftReport((loss_signal(losses), *others, *histogram_signals(told.comparison, len(told.newest))))


def fleet_quality(store: Store, against: Mapping[str, list[Concern]]) -> FleetQuality:
    """Of the active clients, as the store knows them."""
    return quality.fleet_quality(store.clients.all(active=True), store.rounds.participation(), against)


def judge(
    store: Store, client_ids: Collection[str], against: Mapping[str, list[Concern]], clock: ClockPort
) -> dict[str, bool]:
    """Let a round count for or against the clients that took part, and record the verdicts that have ripened.

    What keeps a client's line bad, or its records few, is not its data: only what was seen of that counts here.

    Returns:
        What became of those whose verdict changed.
    """
    kept: dict[str, dict[str, int]] = store.metadata.get(_STANDING) or {}
    # Most clients are fine for ever: of these nothing is kept, and nobody looks at them.
    concerned = sorted(c for c in client_ids if c in kept or c in against)
    decided, changed, standings = store.clients.validations(concerned), {}, dict(kept)
    for client_id in concerned:
        if client_id in decided and not decided[client_id].automatic:
            standings.pop(client_id, None)
            continue
        found = against.get(client_id, [])
        standing = ValidationStreak.from_json(kept.get(client_id)).after(quality.score_of(found))
        validated = store.clients.get(client_id).validated
        verdict = standing.verdict(validated)
        if verdict is not None:
            reason = " ".join(words for words, _ in found) or "Nothing speaks against its data any more."
            store.clients.validate(client_id, ClientValidation(verdict, reason, clock.now(), automatic=True))
            changed[client_id] = verdict
        standings[client_id] = asdict(standing)
        if verdict or (validated and not standing.against):
            del standings[client_id]
    if standings != kept:
        store.metadata.set(_STANDING, standings)
    return changed


class DataWatch:
    """Looks at the fleet's data after each round in which something of it was seen, in the loop's own thread.

    Args:
        on_health: told the scores of quality and drift.
    """

    def __init__(self, store: Store, on_health: Callable[[float | None, float | None], None], clock: ClockPort) -> None:
        self._store, self._on_health, self._clock = store, on_health, clock
        self._told: FleetHistograms | None = None

    def new_window(self) -> None:
        """FleetHistograms have arrived, or another reference is in force."""
        self._told = None

    def after_round(self, outcomes: Collection[ClientOutcome]) -> None:
        """Judge those that took part. Whatever goes wrong here is no fault of the round, which is committed."""
        if self._told is not None and all(outcome.update_norm is None for outcome in outcomes):
            return
        try:
            self._look({outcome.client_id for outcome in outcomes})
        except FedvitError as error:
            _LOG.warning("The fleet's data was not looked at: %s", error)

    def _look(self, client_ids: Collection[str]) -> None:
        told = self._told = self._told or histograms(self._store)
        against = doubts(self._store, told)
        for client_id, validated in judge(self._store, client_ids, against, self._clock).items():
            _LOG.warning(
                "%s is %s: %s",
                client_id,
                "validated" if validated else "not validated any more",
                against.get(client_id),
            )
        # Of a very large fleet only those are counted who ask: see GET /api/clients/data-quality.
        if self._store.clients.population() <= _COUNTED:
            found = drift(self._store, told)
            self._on_health(fleet_quality(self._store, against).score, found.score)


def _trained(store: Store, name: str) -> ModelVersion:
    version = store.versions.get(name)
    return version if version.derived_from is None else _trained(store, version.derived_from)
