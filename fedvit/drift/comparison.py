"""Statistical tests for data drift between two windows of private histograms.

Each client is compared with itself, so differences between clients do not matter. Let ``c`` be the shares of its newest
histogram over ``n`` records, and ``r`` those of its reference over ``m``. Without drift ``d = c - r`` has mean 0 and
covariance

    (1/n + 1/m) (diag(p) - p p') + s^2 (1/n^2 + 1/m^2) I

of multinomial sampling and of noise with the known standard deviation ``s`` in each count. So ``d' Sigma^-1 d`` is
close to chi-squared with as many degrees of freedom as there are bins (Wald 1943). Thresholds follow from the allowed
rate of false alarms, :data:`FALSE_ALARMS` a window, divided evenly (Bonferroni) over the whole fleet, clusters of
clients, single clients, and features. A significant shift counts only if its stability index reaches
:data:`LEAST_INDEX`.

Three quarters of the false alarms are for the risk: the number of records that the model is expected to get wrong, by
their classes. It is one number a client, so it holds little noise, and only its rise matters. With ``z`` a client's
rise in standard deviations, the sum of ``max(z, 0)^2`` over the fleet detects a shift in a part of the fleet. Without
drift in N clients it is chi-bar-squared: a mixture of chi-squareds of k degrees of freedom, weighted by the probability
that k of N signs are positive (Kudo 1963, Biometrika 50(3/4)).

PSI: Siddiqi 2006, see :mod:`fedvit.drift.signals`. JS: Lin 1991, IEEE Trans. Inf. Theory 37(1). KS: Massey 1951.
Embeddings: sliced Wasserstein, Rabin et al. 2011. Drift in clusters of clients: Jothimurugesan et al. 2023
(arXiv:2206.00799).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedvit.wire.histograms import LABEL, RECORDS, RISK, RISK_VOTES, ClientHistogram, HistogramSpec

Floats = npt.NDArray[np.float64]

FALSE_ALARMS = 0.008
"""Rate of false alarms for a window without drift."""
RISK_ALARMS = 0.75
"""Share of the false alarms for the risk."""
LEAST_RISE = 0.005
"""Smallest rise of the share of expected errors that counts as a shift."""
LEAST_INDEX = 0.1
"""Smallest stability index that counts as a shift, by the convention of credit scoring."""
SCOPES = 3
"""Fleet, clusters, clients."""
CLUSTER_OF, MOST_CLUSTERS = 4, 8
"""Clients for each cluster, and most clusters."""
_LLOYD_STEPS = 10
_NAMED = 0.1
"""Share of the risk's false alarms for naming single clients."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Distances between two noised histograms: ``js`` in bits, ``wasserstein`` in bins."""

    psi: float
    js: float
    ks: float
    wasserstein: float


@dataclass(frozen=True, slots=True)
class Shift:
    """Test result for one feature of some clients. The risk has two bins: records expected right, and wrong."""

    feature: str
    client_ids: tuple[str, ...]
    statistic: float
    threshold: float
    distance: Distance

    @property
    def size(self) -> tuple[float, float]:
        """Practical size of the shift, and the least that counts."""
        return (self.distance.ks, LEAST_RISE) if self.feature == RISK else (self.distance.psi, LEAST_INDEX)

    @property
    def score(self) -> float:
        """0.5 at the threshold and 1 at twice that; below 0.5 without practical size."""
        score = min(1.0, 0.5 * self.statistic / self.threshold)
        size, least = self.size
        return score if size >= least else min(score, 0.49)

    @property
    def drifts(self) -> bool:
        """Whether the shift is significant and large enough to matter."""
        return self.score >= 0.5


@dataclass(frozen=True, slots=True)
class Comparison:
    """A window against its reference, by feature: the whole fleet, clusters of clients, single clients.

    ``clusters`` have similar label mixes in the reference. ``by_client`` has only shifts beyond the threshold.
    """

    client_ids: tuple[str, ...]
    clusters: tuple[tuple[str, ...], ...]
    fleet: Mapping[str, Shift]
    by_cluster: Mapping[str, tuple[Shift, ...]]
    by_client: Mapping[str, tuple[Shift, ...]]

    @property
    def drifting_clients(self) -> dict[str, tuple[str, ...]]:
        """Features that drift at single clients, by client."""
        by_client: dict[str, list[str]] = {}
        for feature, shifts in self.by_client.items():
            for shift in shifts:
                if shift.drifts:
                    by_client.setdefault(shift.client_ids[0], []).append(feature)
        return {client_id: tuple(features) for client_id, features in sorted(by_client.items())}

    @property
    def drifting_clusters(self) -> tuple[Shift, ...]:
        """Shifts of whole clusters."""
        return tuple(shift for shifts in self.by_cluster.values() for shift in shifts if shift.drifts)

    def worst(self, feature: str) -> Shift:
        """The shift of a feature with the highest score at any scope."""
        return max((self.fleet[feature], *self.by_cluster[feature], *self.by_client[feature]), key=lambda s: s.score)

    @property
    def drifting(self) -> bool:
        """Whether anything drifts anywhere."""
        return any(self.worst(feature).drifts for feature in self.fleet)


def compare(
    reference: Mapping[str, ClientHistogram],
    current: Mapping[str, ClientHistogram],
    spec: HistogramSpec,
    same_basis: Collection[str] = (),
    false_alarms: float = FALSE_ALARMS,
) -> Comparison | None:
    """Compare the clients with a histogram in both windows; None without any. The order of histograms does not matter.

    Args:
        spec: of the current histograms; those of other specs are left out.
        same_basis: digests of specs that differ in the risk's votes alone; their risk is not compared.
    """
    known = {spec.digest, *same_basis}
    ids = tuple(sorted(c for c in reference.keys() & current.keys() if _comparable(reference[c], current[c], known)))
    if not ids:
        return None
    old, new = (_Window.of([window[c] for c in ids]) for window in (reference, current))
    groups = clusters_of(old.shares(spec.slices[LABEL]))
    histograms = {name: part for name, part in spec.slices.items() if name != RISK}
    tests = _Tests((1 - RISK_ALARMS) * false_alarms / SCOPES / len(histograms), ids, groups)
    pairs = {name: _Pair.of(old, new, part) for name, part in histograms.items()}
    fleet = {name: tests.group(name, pair, tuple(range(len(ids))), 1) for name, pair in pairs.items()}
    by_client = {name: tests.clients(name, pair) for name, pair in pairs.items()}
    same_votes = [i for i, c in enumerate(ids) if reference[c].spec_digest == current[c].spec_digest == spec.digest]
    if same_votes and any(spec.risk_votes):
        risk = _Risk.of(old, new, same_votes, spec)
        names = tuple(ids[i] for i in same_votes)
        fleet[RISK] = risk.fleet(names, RISK_ALARMS * false_alarms * (1 - _NAMED))
        by_client[RISK] = risk.clients(names, RISK_ALARMS * false_alarms * _NAMED)
    return Comparison(
        client_ids=ids,
        clusters=tuple(tuple(ids[i] for i in group) for group in groups),
        fleet=fleet,
        by_cluster={name: tests.clusters(name, pairs[name]) if name in pairs else () for name in fleet},
        by_client=by_client,
    )


def distance(reference: Sequence[float] | Floats, current: Sequence[float] | Floats) -> Distance:
    """Distances of two histograms of the same bins; negative counts, which noise makes, count as 0."""
    r, c = _smoothed(np.asarray(reference, dtype=np.float64)), _smoothed(np.asarray(current, dtype=np.float64))
    middle = (r + c) / 2
    js = 0.5 * np.sum(r * np.log2(r / middle)) + 0.5 * np.sum(c * np.log2(c / middle))
    cumulated = np.abs(np.cumsum(c - r))
    return Distance(
        float(np.sum((c - r) * np.log(c / r))), float(max(0.0, js)), float(cumulated.max()), float(cumulated.sum())
    )


def share_at_least(histogram: ClientHistogram, spec: HistogramSpec, kind: int, deviations: float = 3.0) -> float:
    """Share of a client's records of one :data:`~fedvit.wire.histograms.RECORD_KINDS` beyond the noise."""
    count = histogram.counts[spec.slices[RECORDS].start + kind]
    return float(max(0.0, count - deviations * histogram.deviation)) / max(histogram.num_examples, 1)


def clusters_of(shares: Floats) -> tuple[tuple[int, ...], ...]:
    """Clusters of similar rows [N, B], by k-means seeded with the rows furthest apart; deterministic."""
    wanted = min(MOST_CLUSTERS, len(shares) // CLUSTER_OF)
    if wanted < 2:
        return ()
    centres = [shares[0]]
    while len(centres) < wanted:
        centres.append(shares[int(np.argmax(_squares(shares, np.array(centres)).min(axis=1)))])
    means = np.array(centres)
    for _ in range(_LLOYD_STEPS):
        nearest = np.argmin(_squares(shares, means), axis=1)
        means = np.array(
            [shares[nearest == i].mean(axis=0) if np.any(nearest == i) else means[i] for i in range(wanted)]
        )
    groups = (tuple(int(i) for i in np.flatnonzero(nearest == k)) for k in range(wanted))
    return tuple(group for group in groups if len(group) > 1)


@dataclass(frozen=True, slots=True)
class _Window:
    """Histograms of N clients: counts [N, cells], records [N], standard deviations of the noise [N]."""

    counts: Floats
    records: Floats
    deviations: Floats

    @classmethod
    def of(cls, histograms: Sequence[ClientHistogram]) -> _Window:
        return cls(
            np.array([histogram.counts for histogram in histograms], dtype=np.float64),
            np.array([max(histogram.num_examples, 1) for histogram in histograms], dtype=np.float64),
            np.array([histogram.deviation for histogram in histograms], dtype=np.float64),
        )

    def shares(self, part: slice) -> Floats:
        return self.counts[:, part] / self.records[:, None]


@dataclass(frozen=True, slots=True)
class _Pair:
    """One feature in both windows, by client: shares [N, B] and the terms of their difference's covariance."""

    reference: Floats
    current: Floats
    weights: Floats
    expected: Floats
    sampling: Floats
    noise: Floats

    @classmethod
    def of(cls, old: _Window, new: _Window, part: slice) -> _Pair:
        both = np.clip(old.counts[:, part] + new.counts[:, part], 0.0, None) + 0.5
        return cls(
            reference=old.shares(part),
            current=new.shares(part),
            weights=old.records,
            expected=both / both.sum(axis=1, keepdims=True),
            sampling=1 / old.records + 1 / new.records,
            noise=(old.deviations / old.records) ** 2 + (new.deviations / new.records) ** 2,
        )

    def statistics(self) -> Floats:
        """``d' Sigma^-1 d`` of every client [N], by Sherman and Morrison's formula."""
        d, p, k = self.current - self.reference, self.expected, self.sampling
        a = k[:, None] * p + self.noise[:, None]
        across = np.sum(d * p / a, axis=1)
        return np.asarray(np.sum(d * d / a, axis=1) + k * across**2 / (1 - k * np.sum(p * p / a, axis=1)))

    def statistic(self, group: Sequence[int]) -> float:
        """``d' Sigma^-1 d`` of a group, its clients weighted by their records in the reference."""
        at = list(group)
        w = self.weights[at] / self.weights[at].sum()
        d = w @ (self.current[at] - self.reference[at])
        p, sampled = self.expected[at], w**2 * self.sampling[at]
        covariance = np.diag(sampled @ p + np.sum(w**2 * self.noise[at])) - (p * sampled[:, None]).T @ p
        return float(d @ np.linalg.solve(covariance, d))

    def distance(self, group: Sequence[int]) -> Distance:
        at = list(group)
        w = self.weights[at]
        # In records, so that the smoothing of empty bins weighs little.
        return distance(w @ self.reference[at], w @ self.current[at])


@dataclass(frozen=True, slots=True)
class _Tests:
    """Tests with a false-alarm probability of ``level`` for each feature and scope."""

    level: float
    ids: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    def group(self, name: str, pair: _Pair, group: tuple[int, ...], tests: int) -> Shift:
        names = tuple(self.ids[i] for i in group)
        threshold = _threshold(self.level / tests, pair.reference.shape[1])
        return Shift(name, names, pair.statistic(group), threshold, pair.distance(group))

    def clusters(self, name: str, pair: _Pair) -> tuple[Shift, ...]:
        # Clusters are chosen by the label counts of the reference, which would regress to their means.
        groups = () if name == LABEL else self.groups
        return tuple(self.group(name, pair, group, len(groups)) for group in groups)

    def clients(self, name: str, pair: _Pair) -> tuple[Shift, ...]:
        threshold = _threshold(self.level / len(self.ids), pair.reference.shape[1])
        statistics = pair.statistics()
        return tuple(
            Shift(name, (self.ids[i],), float(statistics[i]), threshold, pair.distance((int(i),)))
            for i in np.flatnonzero(statistics >= threshold)
        )


@dataclass(frozen=True, slots=True)
class _Risk:
    """Shares of records that the model is expected to get wrong, for N clients, and their rises.

    ``before`` and ``rises`` [N]; ``deviations`` [N] of the rises; ``weights`` [N], records in the reference.
    """

    before: Floats
    rises: Floats
    deviations: Floats
    weights: Floats

    @classmethod
    def of(cls, old: _Window, new: _Window, at: Sequence[int], spec: HistogramSpec) -> _Risk:
        part, scale = spec.slices[RISK], 2.0 * RISK_VOTES
        shares = [0.5 + window.shares(part)[at, 0] / scale for window in (old, new)]
        variance = cls._variance(old, new, spec) / scale**2
        n, m = new.records[at], old.records[at]
        noise = (new.deviations[at] / n) ** 2 + (old.deviations[at] / m) ** 2
        deviations = np.sqrt(variance * (1 / n + 1 / m) + noise / scale**2)
        return cls(shares[0], shares[1] - shares[0], deviations, m)

    @staticmethod
    def _variance(old: _Window, new: _Window, spec: HistogramSpec) -> float:
        """Variance of one record's votes by the fleet's label mix, raised towards its maximum by that mix's noise."""
        part = spec.slices[LABEL]
        counts = np.clip(old.counts[:, part].sum(axis=0) + new.counts[:, part].sum(axis=0), 0.0, None)
        # Classes that share a bin have the mean of their votes; the margin for noise covers their differences.
        bins = np.arange(spec.classes) * len(counts) // spec.classes
        votes = np.bincount(bins, spec.risk_votes) / np.bincount(bins)
        total = float(counts.sum())
        noise = float(np.sqrt(len(counts) * (np.sum(old.deviations**2) + np.sum(new.deviations**2))))
        shares = counts / max(total, 1.0)
        spread = float(shares @ votes**2 - (shares @ votes) ** 2)
        return (total * spread + noise * RISK_VOTES**2) / max(total + noise, 1.0)

    def fleet(self, names: tuple[str, ...], level: float) -> Shift:
        positive = np.clip(self.rises / self.deviations, 0.0, None)
        threshold = _one_sided_threshold(level, len(names))
        return self._shift(names, float(positive @ positive), threshold, np.arange(len(names)))

    def clients(self, names: tuple[str, ...], level: float) -> tuple[Shift, ...]:
        threshold = _one_sided_threshold(level / len(names), 1)
        z = self.rises / self.deviations
        risen = np.flatnonzero(np.clip(z, 0.0, None) ** 2 >= threshold)
        return tuple(self._shift((names[i],), float(z[i] ** 2), threshold, np.array([i])) for i in risen)

    def _shift(self, names: tuple[str, ...], statistic: float, threshold: float, at: npt.NDArray[np.int64]) -> Shift:
        w = self.weights[at]
        whole, before = float(w.sum()), float(w @ self.before[at])
        after = before + float(w @ self.rises[at])
        return Shift(RISK, names, statistic, threshold, distance([whole - before, before], [whole - after, after]))


@lru_cache(maxsize=1024)
def _one_sided_threshold(level: float, count: int) -> float:
    """Upper quantile of the sum of ``max(z, 0)^2`` over ``count`` standard normals."""
    from scipy.optimize import brentq
    from scipy.stats import binom, chi2

    signs = np.arange(1, count + 1)
    chances = binom.pmf(signs, count, 0.5)
    if chances.sum() <= level:
        return 0.0
    return float(brentq(lambda x: float(chances @ chi2.sf(x, signs)) - level, 0.0, 4.0 * count + 200.0))


@lru_cache(maxsize=1024)
def _threshold(level: float, bins: int) -> float:
    # Imported here: it takes half a second, and most processes never need it.
    from scipy.stats import chi2

    return float(chi2.isf(level, bins))


def _comparable(old: ClientHistogram, new: ClientHistogram, known: Collection[str]) -> bool:
    same = {old.spec_digest, new.spec_digest} <= set(known)
    return same and (old.run_id, old.round_index) != (new.run_id, new.round_index)


def _smoothed(counts: Floats) -> Floats:
    filled = np.clip(counts, 0.0, None) + 0.5
    return filled / float(filled.sum())


def _squares(rows: Floats, centres: Floats) -> Floats:
    return np.asarray(((rows[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2))
