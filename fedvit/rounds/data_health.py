"""Health of the fleet's data, read from the store, and the automatic validation and quarantine of clients."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
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
_STREAKS = "standing"
_REFUSED = "refused_updates/"
_COUNTED = 20_000


@dataclass(frozen=True, slots=True)
class FleetHistograms:
    """Each client's newest histogram, its specification, and the comparison with the released model's reference."""

    newest: Mapping[str, ClientHistogram]
    spec: HistogramSpec | None
    comparison: Comparison | None


def histograms(store: Store) -> FleetHistograms:
    """The histograms of the fleet.

    The reference holds the histograms of the time when the released model was trained; a roll-back restores that of the
    older model.
    """
    newest, release = store.histograms.latest(), store.releases.current()
    if not newest:
        return FleetHistograms({}, None, None)
    # Another data set or model has other edges; the specification of most clients is used.
    digest, _ = Counter(histogram.spec_digest for histogram in newest.values()).most_common(1)[0]
    spec = store.histograms.spec(digest)
    if release is None or spec is None:
        return FleetHistograms(newest, spec, None)
    reference = store.histograms.latest(until=_trained(store, release.version).created_at)
    specs = ((digest, store.histograms.spec(digest)) for digest in {h.spec_digest for h in reference.values()})
    same_basis = {digest for digest, other in specs if other is not None and other.basis == spec.basis}
    return FleetHistograms(newest, spec, compare(reference, newest, spec, same_basis))


def reference_spec(store: Store) -> HistogramSpec | None:
    """The specification of the reference's latest histograms; None where there are none."""
    release = store.releases.current()
    return None if release is None else store.histograms.latest_spec(_trained(store, release.version).created_at)


def doubts(store: Store, histograms: FleetHistograms) -> dict[str, list[Concern]]:
    """Concerns about the data of clients, by client."""
    statistics = store.rounds.update_statistics(quality.STATISTICS_ROUNDS)
    return quality.concerns_by_client(statistics, histograms.newest, histograms.spec, histograms.comparison)


def drift(store: Store, histograms: FleetHistograms, *others: Signal) -> DriftReport:
    """Drift by the held-out loss of the latest run, by clients' histograms, and by ``others``."""
    run = store.runs.latest()
    rounds = store.rounds.of_run(run.run_id) if run else []
    losses = [record.loss for record in rounds if record.committed and record.loss is not None]
    by_histograms = histogram_signals(histograms.comparison, len(histograms.newest))
    return DriftReport((loss_signal(losses), *others, *by_histograms))


def fleet_quality(store: Store, against: Mapping[str, list[Concern]]) -> FleetQuality:
    """Data quality of the active clients."""
    return quality.fleet_quality(store.clients.all(active=True), store.rounds.participation(), against)


def judge(
    store: Store, client_ids: Collection[str], against: Mapping[str, list[Concern]], clock: ClockPort
) -> dict[str, bool]:
    """Update the validation streaks of the clients of a round, and record the verdicts that follow.

    Only concerns about the data count, not failures to answer or few records.

    Returns:
        Whether each client whose verdict changed is validated now.
    """
    stored: dict[str, dict[str, int]] = store.metadata.get(_STREAKS) or {}
    # Nothing is stored or read for clients without concerns, which are most.
    concerned = sorted(c for c in client_ids if c in stored or c in against)
    decided, changed, streaks = store.clients.validations(concerned), {}, dict(stored)
    for client_id in concerned:
        if client_id in decided and not decided[client_id].automatic:
            streaks.pop(client_id, None)
            continue
        concerns = against.get(client_id, [])
        streak = ValidationStreak(**(stored.get(client_id) or {})).after(quality.score_of(concerns))
        validated = store.clients.get(client_id).validated
        verdict = streak.verdict(validated)
        if verdict is not None:
            reason = " ".join(words for words, _ in concerns) or "Nothing speaks against its data any more."
            store.clients.validate(client_id, ClientValidation(verdict, reason, clock.now(), automatic=True))
            changed[client_id] = verdict
        streaks[client_id] = asdict(streak)
        if verdict or (validated and not streak.against):
            del streaks[client_id]
    if streaks != stored:
        store.metadata.set(_STREAKS, streaks)
    return changed


def count_invalid_updates(
    store: Store,
    run_id: str,
    round_index: int,
    outcomes: Iterable[ClientOutcome],
    quarantine_after_rejections: int | None,
    clock: ClockPort,
) -> list[str]:
    """Count the updates that are held against each client, once a round however often it is tried.

    The count begins anew with the quarantine, so that a client that is reinstated has as many attempts again.

    Returns:
        The clients that are now in quarantine.
    """
    quarantined = []
    for outcome in outcomes:
        if not outcome.counted_against_client:
            continue
        count = _counted(store, run_id, round_index, outcome.client_id)
        if quarantine_after_rejections is not None and count >= quarantine_after_rejections:
            last = f"the last in round {round_index} of {run_id}: {outcome.error}"
            reason = f"{count} of its updates were refused; {last}"
            quarantined += store.clients.quarantine([outcome.client_id], reason, clock.now())
            store.metadata.set(_REFUSED + outcome.client_id, {"count": 0, "last": [run_id, round_index]})
    return quarantined


def _counted(store: Store, run_id: str, round_index: int, client_id: str) -> int:
    with store.transaction() as transaction:
        counted = transaction.metadata.get(_REFUSED + client_id) or {"count": 0, "last": None}
        count = int(counted["count"])
        if counted["last"] != [run_id, round_index]:
            count += 1
            transaction.metadata.set(_REFUSED + client_id, {"count": count, "last": [run_id, round_index]})
        return count


class DataHealthMonitor:
    """Measures the health of the fleet's data after rounds with new statistics, in the thread of the loop.

    Args:
        on_health: called with the scores of quality and drift.
    """

    def __init__(self, store: Store, on_health: Callable[[float | None, float | None], None], clock: ClockPort) -> None:
        self._store, self._on_health, self._clock = store, on_health, clock
        self._histograms: FleetHistograms | None = None

    def invalidate(self) -> None:
        """Histograms have arrived, or another reference is in force: read them again."""
        self._histograms = None

    def after_round(self, outcomes: Collection[ClientOutcome]) -> None:
        """Judge the clients that took part. An error here does not concern the round, which is committed: the figures
        of one client, which has chosen them, must not end the training of all."""
        if self._histograms is not None and all(outcome.update_norm is None for outcome in outcomes):
            return
        try:
            self._measure({outcome.client_id for outcome in outcomes})
        except FedvitError as error:
            _LOG.warning("The health of the fleet's data was not measured: %s", error)
        except Exception:
            _LOG.exception("The health of the fleet's data was not measured")

    def _measure(self, client_ids: Collection[str]) -> None:
        newest = self._histograms = self._histograms or histograms(self._store)
        against = doubts(self._store, newest)
        for client_id, validated in judge(self._store, client_ids, against, self._clock).items():
            verdict = "validated" if validated else "not validated any more"
            _LOG.warning("%s is %s: %s", client_id, verdict, against.get(client_id))
        # For a very large fleet it is computed on request only: GET /api/clients/data-quality.
        if self._store.clients.population() <= _COUNTED:
            report = drift(self._store, newest)
            self._on_health(fleet_quality(self._store, against).score, report.score)


def _trained(store: Store, name: str) -> ModelVersion:
    version = store.versions.get(name)
    return version if version.derived_from is None else _trained(store, version.derived_from)
