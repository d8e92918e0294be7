"""Windows of histograms against their reference: exact sums, known false alarms, and drift that comes to some first."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from fedvit.drift.comparison import (
    Comparison,
    _one_sided_threshold,
    clusters_of,
    compare,
    distance,
    share_at_least,
)
from fedvit.wire.histograms import LABEL, RISK, ClientHistogram, HistogramSpec

SPEC = HistogramSpec({"blur": tuple(range(7)), "brightness": tuple(range(7))}, 5, (-4, -4, -1, 2, 4))
CLIENTS = 24
Shares = Mapping[str, npt.NDArray[np.float64]]


class World:
    """Clients that are unlike each other, each with its own share of every bin; windows are drawn from them."""

    def __init__(self, seed: int, *, records: int = 400, deviation: float = 25.0) -> None:
        self.draw = np.random.default_rng(seed)
        self.deviation = deviation
        self.sizes = self.draw.integers(records // 2, 2 * records, CLIENTS)
        self.shares: list[Shares] = [
            {name: self.draw.dirichlet(np.full(bins, 0.7)) for name, bins in SPEC.sizes.items() if name != RISK}
            for _ in self.sizes
        ]

    def window(
        self, round_index: int, moved: Mapping[int, float] | None = None, feature: str = "brightness", to: int = -1
    ) -> dict[str, ClientHistogram]:
        """``moved``: by how much of its share each client's feature has become that of one bin."""
        moves = moved or {}
        return {
            f"vehicle-{i:02d}": self._histogram(i, round_index, moves.get(i, 0.0), feature, to) for i in range(CLIENTS)
        }

    def compare(
        self, moved: Mapping[int, float] | None = None, feature: str = "brightness", to: int = -1
    ) -> Comparison:
        result = compare(self.window(1), self.window(11, moved, feature, to), SPEC)
        assert result is not None
        return result

    def _histogram(self, i: int, round_index: int, moved: float, feature: str, to: int) -> ClientHistogram:
        parts = []
        for name, shares in self.shares[i].items():
            mix = (1 - moved) * shares + moved * np.eye(len(shares))[to] if name == feature else shares
            parts.append(self.draw.multinomial(self.sizes[i], mix))
        labels = parts[list(self.shares[i]).index(LABEL)]
        parts.append(np.array([SPEC.risk(dict(enumerate(labels.tolist())))]))
        noised = np.rint(np.concatenate(parts) + self.draw.normal(0, self.deviation, SPEC.cells))
        counts = tuple(int(count) for count in noised)
        place = (f"vehicle-{i:02d}", "run-0001", round_index, int(self.sizes[i]))
        return ClientHistogram(*place, SPEC.digest, self.deviation, counts)


@pytest.mark.parametrize(("records", "deviation"), [(400, 25.0), (60, 25.0), (400, 1.0)])
def test_a_fleet_that_stays_as_it_is_hardly_ever_raises_an_alarm(records: int, deviation: float) -> None:
    """DRIFT_WINDOWS of them; `make bench-drift` asks a thousand on real images."""
    windows = int(os.environ.get("DRIFT_WINDOWS", "150"))
    alarms = 0
    for seed in range(windows):
        alarms += World(seed, records=records, deviation=deviation).compare().drifting
    # At a true rate of 1%, more than this many is a matter of one in a thousand.
    allowed = windows * 0.01 + 3.1 * (windows * 0.01 * 0.99) ** 0.5 + 1
    assert alarms <= allowed


def test_the_statistic_has_the_spread_that_the_threshold_is_made_for() -> None:
    result = [World(seed).compare().fleet["brightness"].statistic for seed in range(150)]
    # Chi-squared with 8 degrees of freedom: mean 8, variance 16.
    assert np.mean(result) == pytest.approx(8, abs=4 * (16 / 150) ** 0.5)
    assert np.var(result) == pytest.approx(16, rel=0.6)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_drift_is_seen_where_it_is_and_named(share: float) -> None:
    moved = dict.fromkeys(range(int(share * CLIENTS)), 0.7)
    detected, named, others = 0, 0, 0
    for seed in range(20):
        result = World(seed).compare(moved)
        detected += result.worst("brightness").drifts
        named += len(result.drifting_clients.keys() & {f"vehicle-{i:02d}" for i in moved})
        others += len([c for c in result.drifting_clients if int(c[-2:]) not in moved])
        assert not result.fleet["blur"].drifts
    assert detected == 20
    assert named > 0.8 * 20 * len(moved)
    assert others == 0


def test_a_shift_too_small_for_any_client_is_seen_in_the_fleet() -> None:
    world = World(3, records=150, deviation=30.0)
    result = world.compare(dict.fromkeys(range(CLIENTS), 0.45))
    assert result.drifting_clients == {}
    assert result.fleet["brightness"].drifts
    assert not result.fleet[LABEL].drifts


def test_the_risk_has_the_spread_that_its_threshold_is_made_for() -> None:
    result = [World(seed).compare().fleet[RISK].statistic for seed in range(150)]
    # Half a squared normal each: mean 1/2, variance 5/4. The margin for what is not known of the labels makes it less.
    assert 0.75 * CLIENTS / 2 < np.mean(result) < CLIENTS / 2 + 4 * (1.25 * CLIENTS / 150) ** 0.5
    # One in a hundred of these, and of a single client's, by simulation.
    draw = np.random.default_rng(0)
    for count in (1, 24, 300):
        drawn = (np.clip(draw.standard_normal((20_000, count)), 0, None) ** 2).sum(axis=1)
        assert float(np.mean(drawn > _one_sided_threshold(0.01, count))) == pytest.approx(0.01, abs=0.003)


def test_a_class_mix_that_costs_a_few_points_in_part_of_the_fleet_is_seen_by_the_risk_alone() -> None:
    third = dict.fromkeys(range(CLIENTS // 3), 0.12)
    result = [World(seed).compare(third, LABEL, to=4) for seed in range(20)]
    assert sum(each.fleet[RISK].drifts for each in result) >= 18
    assert not any(each.worst(LABEL).drifts for each in result)
    detected = next(each.fleet[RISK] for each in result if each.fleet[RISK].drifts)
    assert 0.005 <= detected.distance.ks < 0.08
    # Better news is none.
    assert not any(World(seed).compare(third, LABEL, to=0).worst(RISK).drifts for seed in range(20))


def test_a_single_client_whose_records_are_all_hard_now_is_named() -> None:
    result = World(2).compare({5: 0.9}, LABEL, to=4)
    assert RISK in result.drifting_clients["vehicle-05"]
    assert set(result.drifting_clients) == {"vehicle-05"}


def test_a_rise_without_size_is_no_drift_however_sure_it_is() -> None:
    result = World(0, records=4_000_000, deviation=1.0).compare(dict.fromkeys(range(CLIENTS), 0.003), LABEL, to=4)
    assert result.fleet[RISK].statistic > 10 * result.fleet[RISK].threshold
    assert not result.fleet[RISK].drifts


def test_the_risk_is_compared_under_the_same_votes_and_everything_else_under_the_same_edges() -> None:
    other = replace(SPEC, risk_votes=(4, 4, 4, -4, -4))
    assert (other.basis, other.digest == SPEC.digest) == (SPEC.basis, False)
    world = World(1)
    old, new = world.window(1), world.window(11, dict.fromkeys(range(CLIENTS), 0.7))
    earlier = {name: replace(histogram, spec_digest=other.digest) for name, histogram in old.items()}
    assert compare(earlier, new, SPEC) is None
    result = compare(earlier, new, SPEC, {other.digest})
    assert result is not None
    assert RISK not in result.fleet
    assert result.fleet["brightness"].drifts
    mixed = earlier | {f"vehicle-{i:02d}": old[f"vehicle-{i:02d}"] for i in range(4)}
    some = compare(mixed, new, SPEC, {other.digest})
    assert some is not None
    assert (len(some.client_ids), some.fleet[RISK].client_ids) == (CLIENTS, tuple(sorted(old))[:4])
    # A model of which nothing is known has no votes.
    blank = replace(SPEC, risk_votes=())
    nothing = [{n: replace(s, spec_digest=blank.digest) for n, s in window.items()} for window in (old, new)]
    unknown = compare(*nothing, blank)
    assert unknown is not None
    assert RISK not in unknown.fleet


def test_the_order_of_histograms_changes_no_bit() -> None:
    world = World(5)
    old, new = world.window(1), world.window(11, {0: 0.8, 7: 0.8})
    first = compare(old, new, SPEC)
    for seed in range(5):
        names = list(old)
        random.Random(seed).shuffle(names)
        assert compare({n: old[n] for n in names}, {n: new[n] for n in reversed(names)}, SPEC) == first


def test_only_histograms_that_can_be_compared_are() -> None:
    old, new = World(1).window(1), World(1).window(11)
    assert compare(old, old, SPEC) is None
    assert compare(old, {}, SPEC) is None
    other = {name: replace(histogram, spec_digest="0" * 64) for name, histogram in new.items()}
    assert compare(old, other, SPEC) is None
    few = compare(old, {"vehicle-03": new["vehicle-03"], "newcomer": new["vehicle-04"]}, SPEC)
    assert few is not None
    assert (few.client_ids, few.clusters) == (("vehicle-03",), ())


def test_distances_are_those_of_the_books() -> None:
    same = distance([1e6, 3e6], [2e6, 6e6])
    assert (same.psi, same.js, same.ks, same.wasserstein) == pytest.approx((0, 0, 0, 0), abs=1e-6)
    result = distance([5e8, 5e8], [6e8, 4e8])
    assert result.psi == pytest.approx(0.1 * np.log(1.2) - 0.1 * np.log(0.8), rel=1e-5)
    assert result.ks == pytest.approx(0.1, rel=1e-5)
    # All mass moved three bins on, and to where none was: a whole bit, and three bins.
    far = distance([1e9, 0, 0, 0], [0, 0, 0, 1e9])
    assert (far.js, far.ks, far.wasserstein) == pytest.approx((1.0, 1.0, 3.0), rel=1e-5)
    # What noise makes negative counts as none.
    assert distance([-40.0, 1000.0], [-3.0, 1000.0]).psi == pytest.approx(0.0, abs=1e-9)


def test_clusters_are_of_clients_that_are_alike_and_the_same_every_time() -> None:
    draw = np.random.default_rng(0)
    kinds = np.eye(3)[np.arange(12) % 3]
    rows = np.clip(kinds + draw.normal(0, 0.05, kinds.shape), 0, None)
    clusters = clusters_of(rows)
    assert clusters == clusters_of(rows)
    assert sorted(i for group in clusters for i in group) == list(range(12))
    assert all(len({i % 3 for i in group}) == 1 for group in clusters)
    assert clusters_of(rows[:5]) == ()


def test_broken_records_count_once_noise_does_not_explain_them() -> None:
    counts = [0] * (SPEC.cells - 4) + [500, 20, 480, 0]
    histogram = ClientHistogram("vehicle", "run-0001", 1, 1000, SPEC.digest, 20.0, tuple(counts))
    assert share_at_least(histogram, SPEC, 1) == 0.0
    assert share_at_least(histogram, SPEC, 2) == pytest.approx(0.42)
