"""Message format of private histograms: noised counts of a client's records in bins that the server gives.

A histogram is a fixed number of bounded integers, one for each bin. The client adds the noise before it sends them.
docs/explanation/drift.md says what the noise protects and what it costs. :mod:`fedvit.drift.measures` computes the
counts, :mod:`fedvit.drift.comparison` compares them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fedvit.errors import UpdateRejectedError
from fedvit.wire.untrusted import fields_of, integer, number, text

MAX_CELLS = 1024
"""The most bins of all histograms together: four kilobytes, a third of a picture of 64 pixels."""
CELL_LIMIT = 2**24
"""The largest magnitude of a count."""
MAX_LABEL_BINS = 256
MAX_CLASSES = 2**16
CLIENT_VOTES = 64
"""The total of each histogram where clients are the privacy unit, whatever a client's number of records."""
LABEL, RECORDS = "label", "records"
RISK = "risk"
"""The sum of :attr:`HistogramSpec.risk_votes` over the records, a single number."""
RISK_VOTES = 4
"""The largest change of :data:`RISK` by one record."""
RECORD_KINDS = ("sound", "duplicate", "undecodable")
"""The bins of the histogram :data:`RECORDS`."""
_MAX_NAME = 64


@dataclass(frozen=True)
class HistogramSpec:
    """The histograms of a histogram, the same for every client.

    Args:
        edges: by feature, the inner edges, ascending: one bin more than there are edges, the outer two open.
        classes: how many labels there are; the histogram :data:`LABEL` has a bin for each, up to 256.
        risk_votes: by class, what a record of it adds to :data:`RISK`: from ``-RISK_VOTES`` where the model is always
            right to ``RISK_VOTES`` where it is always wrong; nothing where that is not known.
    """

    edges: Mapping[str, tuple[float, ...]]
    classes: int
    risk_votes: tuple[int, ...] = ()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many bins each histogram has, in the order in which they are sent."""
        measured = {name: len(edges) + 1 for name, edges in sorted(self.edges.items())}
        return {**measured, LABEL: min(self.classes, MAX_LABEL_BINS), RECORDS: len(RECORD_KINDS), RISK: 1}

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The slice of each histogram in the counts."""
        slices, start = {}, 0
        for name, size in self.sizes.items():
            slices[name] = slice(start, start + size)
            start += size
        return slices

    @property
    def cells(self) -> int:
        """The number of all counts."""
        return sum(self.sizes.values())

    def sensitivity(self, privacy_unit: str) -> float:
        """The L2 sensitivity of the counts to adding or removing one unit.

        A record is counted once in each of H histograms, and with :data:`RISK_VOTES` in the risk: sqrt(H + 16). A
        client contributes at most :data:`CLIENT_VOTES` records to each.
        """
        histograms = len(self.sizes) - 1
        return math.sqrt(histograms + RISK_VOTES**2) * (1 if privacy_unit == "record" else CLIENT_VOTES)

    def risk(self, counts_by_class: Mapping[int, int]) -> int:
        """The value of :data:`RISK` for so many records of each class."""
        return sum(n * self.risk_votes[c] for c, n in counts_by_class.items()) if self.risk_votes else 0

    def with_risks(self, confusion: Sequence[Sequence[int]]) -> HistogramSpec:
        """The same, with votes by how a model did on held-out images: ``confusion[i][j]`` of class i were called j.

        A class without images has no vote, and nor has any where there are other classes than the spec's.
        """
        if len(confusion) != self.classes:
            return replace(self, risk_votes=())
        wrong = [1 - row[i] / sum(row) if sum(row) else 0.5 for i, row in enumerate(confusion)]
        return replace(self, risk_votes=tuple(round(RISK_VOTES * (2 * share - 1)) for share in wrong))

    @cached_property
    def basis(self) -> str:
        """SHA-256, hex, of all but the votes: histograms of one basis can be compared in everything but the risk."""
        return replace(self, risk_votes=()).digest

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        edges = {name: list(edges) for name, edges in self.edges.items()}
        return {"edges": edges, "classes": self.classes, "risk_votes": list(self.risk_votes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HistogramSpec:
        """The inverse, for an untrusted value; raises UpdateRejectedError where it is none, or has too many bins."""
        try:
            facts = fields_of(value, {"edges", "classes", "risk_votes"})
            classes = integer(facts["classes"], 1, MAX_CLASSES)
            edges, votes = _edges(facts["edges"]), facts["risk_votes"]
            if not isinstance(votes, list | tuple) or len(votes) not in (0, classes):
                raise ValueError("a risk needs a vote for each class")
            spec = cls(edges, classes, tuple(integer(vote, -RISK_VOTES, RISK_VOTES) for vote in votes))
            if spec.cells > MAX_CELLS:
                raise ValueError(f"it has {spec.cells} counts; at most {MAX_CELLS} are allowed")
        except ValueError as error:
            raise UpdateRejectedError(f"This is no description of a histogram: {error}.") from None
        return spec


@dataclass(frozen=True, slots=True)
class HistogramRequest:
    """A request for clients' histograms in a round of a run; noise relative to the sensitivity.

    ``context_digest`` is that of :class:`fedvit.types.TrainTask`: the model's frozen part embeds the images.
    """

    run_id: str
    round_index: int
    noise_multiplier: float
    privacy_unit: str
    spec: HistogramSpec
    context_digest: str = ""

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise in each count."""
        return self.noise_multiplier * self.spec.sensitivity(self.privacy_unit)

    def output_id(self, client_id: str, num_examples: int) -> str:
        """SHA-256, hex, of everything that determines the counts; see :func:`fedvit.privacy.randomness.output_id`."""
        facts = [self.run_id, self.round_index, self.noise_multiplier, self.privacy_unit, self.spec.digest]
        facts = ["histogram", client_id, num_examples, *facts, self.context_digest]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        names = ("run_id", "round_index", "noise_multiplier", "privacy_unit", "context_digest")
        return {**{name: getattr(self, name) for name in names}, "spec": self.spec.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HistogramRequest:
        """The inverse."""
        return cls(**{**value, "spec": HistogramSpec.from_json(value["spec"])})


@dataclass(frozen=True, slots=True)
class ClientHistogram:
    """One client's counts, noised: ``counts`` in the order of the spec's histograms.

    ``num_examples`` is what each histogram counts in all: its records, or its votes.
    """

    client_id: str
    run_id: str
    round_index: int
    num_examples: int
    spec_digest: str
    deviation: float
    counts: tuple[int, ...]


def _edges(value: object) -> dict[str, tuple[float, ...]]:
    """The edges in JSON; raises ValueError where they are none, before more of them are read than may be."""
    if not isinstance(value, dict) or not all(isinstance(given, list | tuple) for given in value.values()):
        raise ValueError("its edges are no lists by name")
    if sum(len(given) + 1 for given in value.values()) > MAX_CELLS:
        raise ValueError(f"it has more than {MAX_CELLS} bins")
    edges = {}
    for name, given in value.items():
        inner = tuple(number(edge, -sys.float_info.max, sys.float_info.max) for edge in given)
        if text(name, _MAX_NAME) in (LABEL, RECORDS, RISK) or list(inner) != sorted(inner):
            raise ValueError(f"the edges of {name!r} are out of order, or it has none")
        edges[name] = inner
    return edges


def checked_counts(spec: HistogramSpec, counts: Sequence[object]) -> tuple[int, ...]:
    """``counts`` if they can be those of a histogram.

    Raises:
        UpdateRejectedError: too many or too few, or one is no integer or out of bounds.
    """
    if len(counts) != spec.cells:
        raise UpdateRejectedError(f"The histogram has {len(counts)} counts; {spec.cells} were asked for.")
    whole = tuple(count for count in counts if isinstance(count, int) and not isinstance(count, bool))
    if len(whole) != len(counts) or any(abs(count) > CELL_LIMIT for count in whole):
        raise UpdateRejectedError(f"A histogram holds integers between -{CELL_LIMIT} and {CELL_LIMIT}.")
    return whole
