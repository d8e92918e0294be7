"""How far each client's data can be relied on.

A client's score is the product of

- the share of its rounds that went well (1 before its first),
- its number of records over :data:`FEW_RECORDS`, at most 1,
- 1/2 if it is a vehicle or a depot that was never heard,
- what was seen of its data: see :func:`seen`,

and 0 in quarantine. It is None where nothing is known: no round, and nothing that speaks against it.

Nothing here looks at an image: what was seen is what a client released under noise, and the ledger holds.
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
# A gradient over fewer is mostly noise, and a client's few records weigh next to nothing.
FEW_RECORDS = 8
NEVER_HEARD = 0.5

CONDUCT_ROUNDS = 40
"""How many of the latest rounds are looked at."""
_LEAST_ROUNDS, _LEAST_FLEET = 3, 3
# Standard deviations of the noise: where labels contradict the model, and where nobody can doubt it any more.
_DOUBTED, _CONTRADICTED = 2.0, 5.0
_UNSOUND = -0.5
_RECENT_NORMS = 2
_NORM_OVER_MEDIAN = 4.0
# An update that is no longer than this part of what is possible is nobody's trouble, however short the others are.
_HARMLESS_NORM = 0.1
_MOVED = 0.65

Doubt = tuple[str, float]
"""What speaks against a client, in words and as a factor below 1."""


@dataclass(frozen=True, slots=True)
class ClientQuality:
    """One client's score from 0 to 1, and in words what lowers it."""

    client_id: str
    score: float | None
    validated: bool
    reasons: tuple[str, ...]
    rounds: int
    failures: int


@dataclass(frozen=True, slots=True)
class FleetQuality:
    """The fleet's, lowest scores first; those of which nothing is known come last."""

    clients: tuple[ClientQuality, ...]

    @property
    def assessed(self) -> int:
        """How many clients have a score."""
        return sum(client.score is not None for client in self.clients)

    @property
    def score(self) -> float | None:
        """The mean of the scores; None where there are none."""
        scores = [client.score for client in self.clients if client.score is not None]
        return sum(scores) / len(scores) if scores else None


def fleet_quality(
    clients: Iterable[Client],
    participation: Mapping[str, Participation],
    seen_of: Mapping[str, Sequence[Doubt]] | None = None,
) -> FleetQuality:
    """Judge clients; those without an entry in ``participation`` took part in no round."""
    judged = [
        client_quality(
            client, participation.get(client.client_id, Participation(0, 0)), (seen_of or {}).get(client.client_id, ())
        )
        for client in clients
    ]
    judged.sort(key=lambda found: (found.score is None, found.score, found.client_id))
    return FleetQuality(tuple(judged))


def client_quality(client: Client, taken: Participation, seen_of: Sequence[Doubt] = ()) -> ClientQuality:
    """Judge one client."""
    doubts = [*_doubts(client, taken), *seen_of]
    score: float | None = 1.0
    for _, factor in doubts:
        score = (score or 0.0) * factor
    reasons = [words for words, _ in doubts]
    if not taken.rounds:
        reasons.append("It took part in no round yet.")
        score = score if doubts else None
    if not client.validated:
        reasons.append("It is not validated.")
    return ClientQuality(client.client_id, score, client.validated, tuple(reasons), taken.rounds, taken.failures)


def seen(
    conduct: Mapping[str, UpdateStatistics],
    histograms: Mapping[str, ClientHistogram],
    spec: HistogramSpec | None,
    comparison: Comparison | None,
) -> dict[str, list[Doubt]]:
    """What was seen of clients' data that speaks against them, by client.

    Args:
        conduct: how their noised updates looked in the latest :data:`CONDUCT_ROUNDS` rounds.
        histograms: the newest of each, and ``spec`` what the counts mean.
        comparison: of these with the reference window.
    """
    doubts: dict[str, list[Doubt]] = {}
    parts = [_contradictions(conduct), _oversized(conduct), _unsound(histograms, spec), _moved(comparison)]
    for client_id, doubt in (found for part in parts for found in part.items()):
        doubts.setdefault(client_id, []).append(doubt)
    return doubts


def score_of(doubts: Sequence[Doubt]) -> float:
    """What is left of 1."""
    return math.prod(factor for _, factor in doubts)


def _contradictions(conduct: Mapping[str, UpdateStatistics]) -> dict[str, Doubt]:
    """Clients whose labels are not what the fleet has learned to expect; see :mod:`fedvit.clients.update_statistics`.

    Their summed alignments over the square root of the rounds are a standard normal where nothing but noise is in them.
    """
    sound = _sound_rounds(conduct)
    found = {}
    for client_id, own in conduct.items():
        told = [alignment for name, alignment in own.alignments.items() if name in sound]
        total = sum(told) / math.sqrt(max(len(told), 1))
        if len(told) >= _LEAST_ROUNDS and total < -_DOUBTED:
            factor = max(0.0, (total + _CONTRADICTED) / (_CONTRADICTED - _DOUBTED))
            words = f"Its labels contradict what the fleet has learned, by {-total:.1f} deviations of the noise."
            found[client_id] = (words, factor)
    return found


def _sound_rounds(conduct: Mapping[str, UpdateStatistics]) -> set[str]:
    """The rounds whose model did not contradict most clients: one that did has not learned from them, and is no measure
    of anybody."""
    rounds: dict[str, list[float]] = {}
    for own in conduct.values():
        for name, alignment in own.alignments.items():
            rounds.setdefault(name, []).append(alignment)
    return {n for n, told in rounds.items() if len(told) >= _LEAST_FLEET and statistics.median(told) > _UNSOUND}


def _oversized(conduct: Mapping[str, UpdateStatistics]) -> dict[str, Doubt]:
    """Clients whose updates are longer than private training makes them, or far longer than everybody else's."""
    recent = {client_id: max(found.norms[-_RECENT_NORMS:]) for client_id, found in conduct.items() if found.norms}
    if not recent:
        return {}
    median = statistics.median(recent.values())
    found = {}
    for client_id, norm in recent.items():
        if norm > 1:
            found[client_id] = (f"Its update is {norm:.1f} times as long as training can have made it.", 0.0)
        elif len(recent) >= _LEAST_FLEET and norm > max(_HARMLESS_NORM, _NORM_OVER_MEDIAN * median):
            found[client_id] = (f"Its update is {norm / median:.1f} times as long as most others'.", 0.0)
    return found


def _unsound(histograms: Mapping[str, ClientHistogram], spec: HistogramSpec | None) -> dict[str, Doubt]:
    found: dict[str, Doubt] = {}
    for client_id, histogram in histograms.items():
        if spec is None or histogram.spec_digest != spec.digest:
            continue
        shares = {kind: share_at_least(histogram, spec, i) for i, kind in enumerate(RECORD_KINDS) if i}
        kind, share = max(shares.items(), key=lambda pair: pair[1])
        if share > 0:
            found[client_id] = (f"At least {share:.0%} of its records are {kind}.", 1 - min(share, 1.0))
    return found


def _moved(comparison: Comparison | None) -> dict[str, Doubt]:
    if comparison is None:
        return {}
    return {
        client_id: (f"Its data has moved since the release: {', '.join(features)}.", _MOVED)
        for client_id, features in comparison.drifting_clients.items()
    }


def _doubts(client: Client, taken: Participation) -> list[Doubt]:
    doubts = []
    if client.quarantined:
        doubts.append((f"It is in quarantine: {client.quarantine_reason or 'an incident'}.", 0.0))
    if taken.failures:
        words = f"It failed or was refused in {taken.failures} of {taken.rounds} rounds."
        doubts.append((words, 1 - taken.failures / taken.rounds))
    if client.num_examples < FEW_RECORDS:
        doubts.append((f"It has only {client.num_examples} records.", client.num_examples / FEW_RECORDS))
    if client.kind is not ClientKind.VIRTUAL and client.last_seen_at is None:
        doubts.append(("It was never heard.", NEVER_HEARD))
    return doubts
