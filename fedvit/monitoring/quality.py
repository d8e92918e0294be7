"""How far each client's data can be relied on, judged from what the server has anyway.

Nothing here was computed on a vehicle's images: only how its rounds went, what it declared, and what was decided on it.

A client's score is the product of

- the share of its rounds that went well (1 before its first),
- its number of records over :data:`FEW_RECORDS`, at most 1,
- 1/2 if it is a vehicle or a depot that was never heard,

and 0 in quarantine. It is None where nothing is known: no round, and nothing that speaks against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedvit.types import Client, ClientKind, Participation

THRESHOLD = 0.7
# A gradient over fewer is mostly noise, and a client's few records weigh next to nothing.
FEW_RECORDS = 8
NEVER_HEARD = 0.5


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


def fleet_quality(clients: Iterable[Client], participation: Mapping[str, Participation]) -> FleetQuality:
    """Judge clients; those without an entry in ``participation`` took part in no round."""
    judged = [client_quality(client, participation.get(client.client_id, Participation(0, 0))) for client in clients]
    judged.sort(key=lambda found: (found.score is None, found.score, found.client_id))
    return FleetQuality(tuple(judged))


def client_quality(client: Client, taken: Participation) -> ClientQuality:
    """Judge one client."""
    doubts = _doubts(client, taken)
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


def _doubts(client: Client, taken: Participation) -> list[tuple[str, float]]:
    """What speaks against a client, in words and as a factor below 1."""
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
