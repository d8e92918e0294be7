"""Data-quality scores of clients, and the validation status that follows from them.

A client's score is the product of

- the share of its rounds without failure (1 before its first),
- its number of records over :data:`FEW_RECORDS`, at most 1,
- 1/2 for a vehicle or a depot that never sent a heartbeat,
- the factors of the concerns about its data: see :func:`concerns_by_client`,

and 0 in quarantine. It is None while nothing is known: no round, and no concern. No image is used: concerns follow from
noised outputs, which were charged to the ledger.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedvit.drift.comparison import Comparison, share_at_least
from fedvit.types import Client, ClientKind, Participation, UpdateStatistics
from fedvit.wire.histograms import RECORD_KINDS, ClientHistogram, HistogramSpec

THRESHOLD = 0.7
# A gradient over fewer records is mostly noise, and weighs little.
FEW_RECORDS = 8
NEVER_HEARD = 0.5

STATISTICS_ROUNDS = 40
"""Latest rounds whose update statistics count."""
_LEAST_ROUNDS, _LEAST_FLEET = 3, 3
# Standard deviations of the noise: from where labels contradict the model, and where that is certain.
_DOUBTED, _CONTRADICTED = 2.0, 5.0
_UNSOUND = -0.5
_RECENT_NORMS = 2
_NORM_OVER_MEDIAN = 4.0
# An update no longer than this part of the clipping norm is harmless, however short the others are.
_HARMLESS_NORM = 0.1
_MOVED = 0.65
BELOW, ABOVE = 0.5, 0.8
"""Scores below count against a client's validation, scores above for it, and others for neither."""
ROUNDS_AGAINST, ROUNDS_FOR = 2, 5
"""Consecutive rounds after which a client loses or regains its validation."""

Concern = tuple[str, float]
"""A reason against a client, in words and as a factor below 1."""


@dataclass(frozen=True, slots=True)
class ClientQuality:
    """One client's score from 0 to 1, and the reasons that lower it."""

    client_id: str
    score: float | None
    validated: bool
    reasons: tuple[str, ...]
    rounds: int
    failures: int


@dataclass(frozen=True, slots=True)
class FleetQuality:
    """The clients' scores, lowest first, unknown ones last."""

    clients: tuple[ClientQuality, ...]

    @property
    def assessed(self) -> int:
        """Number of clients with a score."""
        return sum(client.score is not None for client in self.clients)

    @property
    def score(self) -> float | None:
        """Mean of the scores; None without any."""
        scores = [client.score for client in self.clients if client.score is not None]
        return sum(scores) / len(scores) if scores else None


def fleet_quality(
    clients: Iterable[Client],
    participation: Mapping[str, Participation],
    concerns: Mapping[str, Sequence[Concern]] | None = None,
) -> FleetQuality:
    """Score clients; those without an entry in ``participation`` took part in no round."""
    never, known = Participation(0, 0), concerns or {}
    results = [
        client_quality(client, participation.get(client.client_id, never), known.get(client.client_id, ()))
        for client in clients
    ]
    results.sort(key=lambda result: (result.score is None, result.score, result.client_id))
    return FleetQuality(tuple(results))


def client_quality(client: Client, taken: Participation, data_concerns: Sequence[Concern] = ()) -> ClientQuality:
    """Score one client."""
    concerns = [*_record_concerns(client, taken), *data_concerns]
    score: float | None = score_of(concerns)
    reasons = [words for words, _ in concerns]
    if not taken.rounds:
        reasons.append("It took part in no round yet.")
        score = score if concerns else None
    if not client.validated:
        reasons.append("It is not validated.")
    return ClientQuality(client.client_id, score, client.validated, tuple(reasons), taken.rounds, taken.failures)


def concerns_by_client(
    update_statistics: Mapping[str, UpdateStatistics],
    histograms: Mapping[str, ClientHistogram],
    spec: HistogramSpec | None,
    comparison: Comparison | None,
) -> dict[str, list[Concern]]:
    """Concerns about clients' data, by client.

    Args:
        update_statistics: of noised updates in the latest :data:`STATISTICS_ROUNDS` rounds.
        histograms: the newest of each client; ``spec`` describes them.
        comparison: of these with the reference window.
    """
    concerns: dict[str, list[Concern]] = {}
    of_updates = _contradictions(update_statistics), _oversized(update_statistics)
    for kind in (*of_updates, _unsound(histograms, spec), _moved(comparison)):
        for client_id, concern in kind.items():
            concerns.setdefault(client_id, []).append(concern)
    return concerns


def score_of(concerns: Sequence[Concern]) -> float:
    """Product of the concerns' factors; 1 without any."""
    return math.prod(factor for _, factor in concerns)


@dataclass(frozen=True, slots=True)
class ValidationStreak:
    """Numbers of a client's latest consecutive rounds that count against or for its validation.

    It changes the validation slowly, so that noise does not. An operator's decision is never changed.
    """

    against: int = 0
    speaking_for: int = 0

    def after(self, score: float) -> ValidationStreak:
        """The streak after one more round with this score."""
        if score < BELOW:
            return ValidationStreak(self.against + 1, 0)
        return ValidationStreak(0, self.speaking_for + 1) if score > ABOVE else ValidationStreak()

    def verdict(self, validated: bool) -> bool | None:
        """The new validation of a client that is ``validated`` or not now; None for no change."""
        if validated and self.against >= ROUNDS_AGAINST:
            return False
        return True if not validated and self.speaking_for >= ROUNDS_FOR else None


def _contradictions(update_statistics: Mapping[str, UpdateStatistics]) -> dict[str, Concern]:
    """Clients whose labels contradict what the fleet has learned; see :mod:`fedvit.clients.update_statistics`.

    Summed alignments over the square root of the rounds are a standard normal if they hold only noise.
    """
    sound = _sound_rounds(update_statistics)
    concerns = {}
    for client_id, own in update_statistics.items():
        alignments = [alignment for name, alignment in own.alignments.items() if name in sound]
        total = sum(alignments) / math.sqrt(max(len(alignments), 1))
        if len(alignments) >= _LEAST_ROUNDS and total < -_DOUBTED:
            factor = max(0.0, (total + _CONTRADICTED) / (_CONTRADICTED - _DOUBTED))
            words = f"Its labels contradict what the fleet has learned, by {-total:.1f} deviations of the noise."
            concerns[client_id] = (words, factor)
    return concerns


def _sound_rounds(update_statistics: Mapping[str, UpdateStatistics]) -> set[str]:
    """Rounds whose model did not contradict most clients; others say nothing about a single client."""
    rounds: dict[str, list[float]] = {}
    for own in update_statistics.values():
        for name, alignment in own.alignments.items():
            rounds.setdefault(name, []).append(alignment)
    return {n for n, values in rounds.items() if len(values) >= _LEAST_FLEET and statistics.median(values) > _UNSOUND}


def _oversized(update_statistics: Mapping[str, UpdateStatistics]) -> dict[str, Concern]:
    """Clients whose updates are longer than private training makes them, or far longer than all others."""
    recent = {c: max(own.norms[-_RECENT_NORMS:]) for c, own in update_statistics.items() if own.norms}
    if not recent:
        return {}
    median = statistics.median(recent.values())
    concerns = {}
    for client_id, norm in recent.items():
        if norm > 1:
            concerns[client_id] = (f"Its update is {norm:.1f} times as long as training can have made it.", 0.0)
        elif len(recent) >= _LEAST_FLEET and norm > max(_HARMLESS_NORM, _NORM_OVER_MEDIAN * median):
            concerns[client_id] = (f"Its update is {norm / median:.1f} times as long as most others'.", 0.0)
    return concerns


def _unsound(histograms: Mapping[str, ClientHistogram], spec: HistogramSpec | None) -> dict[str, Concern]:
    concerns: dict[str, Concern] = {}
    for client_id, histogram in histograms.items():
        if spec is None or histogram.spec_digest != spec.digest:
            continue
        shares = {kind: share_at_least(histogram, spec, i) for i, kind in enumerate(RECORD_KINDS) if i}
        kind, share = max(shares.items(), key=lambda pair: pair[1])
        if share > 0:
            concerns[client_id] = (f"At least {share:.0%} of its records are {kind}.", 1 - min(share, 1.0))
    return concerns


def _moved(comparison: Comparison | None) -> dict[str, Concern]:
    if comparison is None:
        return {}
    return {
        client_id: (f"Its data has moved since the release: {', '.join(features)}.", _MOVED)
        for client_id, features in comparison.drifting_clients.items()
    }


def _record_concerns(client: Client, taken: Participation) -> list[Concern]:
    concerns = []
    if client.quarantined:
        concerns.append((f"It is in quarantine: {client.quarantine_reason or 'an incident'}.", 0.0))
    if taken.failures:
        words = f"It failed or was refused in {taken.failures} of {taken.rounds} rounds."
        concerns.append((words, 1 - taken.failures / taken.rounds))
    if client.num_examples < FEW_RECORDS:
        concerns.append((f"It has only {client.num_examples} records.", client.num_examples / FEW_RECORDS))
    if client.kind is not ClientKind.VIRTUAL and client.last_seen_at is None:
        concerns.append(("It was never heard.", NEVER_HEARD))
    return concerns
