"""Concerns about clients by their noised updates, and the validation that follows from them slowly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from fedvit.drift.quality import ValidationStreak, concerns_by_client, fleet_quality, score_of
from fedvit.types import Client, ClientKind, Participation, UpdateStatistics
from fedvit.wire.histograms import ClientHistogram, HistogramSpec


def by_round(alignments: Iterable[float]) -> dict[str, float]:
    return {f"run-0001/{i}": float(alignment) for i, alignment in enumerate(alignments)}


def constant(norm: float, alignment: float, rounds: int) -> UpdateStatistics:
    return UpdateStatistics((norm,) * rounds, by_round([alignment] * rounds))


def fleet(rounds: int = 10, count: int = 12, **liars: UpdateStatistics) -> dict[str, UpdateStatistics]:
    draw = np.random.default_rng(0)
    honest = {
        f"vehicle-{i:02d}": UpdateStatistics((0.8,) * rounds, by_round(0.3 + draw.normal(size=rounds)))
        for i in range(count)
    }
    return honest | liars


def scores(update_statistics: dict[str, UpdateStatistics]) -> dict[str, float]:
    return {
        client_id: score_of(result)
        for client_id, result in concerns_by_client(update_statistics, {}, None, None).items()
    }


def test_labels_that_contradict_the_fleet_round_after_round_are_seen() -> None:
    result = scores(fleet(liar=constant(0.8, -1.7, 10), unlucky=constant(0.8, -0.5, 10)))
    assert result == {"liar": 0.0}
    assert scores(fleet(liar=constant(0.8, -9.0, 2))) == {}
    assert 0 < scores(fleet(doubtful=constant(0.8, -1.0, 9)))["doubtful"] < 1


def test_a_model_that_contradicts_most_clients_is_no_measure_of_any() -> None:
    spoilt = {name: constant(0.8, -2.0, 10) for name in map(str, range(9))}
    assert scores({**spoilt, "liar": constant(0.8, 3.0, 10)}) == {}
    # Nor are the rounds before it was put right held against anybody afterwards.
    after = fleet(rounds=10, count=9)
    both = {
        name: UpdateStatistics(mine.norms, {**mine.alignments, **{f"run-0000/{i}": -4.0 for i in range(5)}})
        for name, mine in after.items()
    }
    assert scores(both) == scores(after)


@pytest.mark.parametrize(("norm", "words"), [(7.9, "7.9 times as long as training"), (0.9, "times as long as most")])
def test_an_update_that_is_too_long_is_seen_at_once(norm: float, words: str) -> None:
    few = {name: UpdateStatistics((0.2,)) for name in ("a", "b", "c")}
    result = concerns_by_client({**few, "liar": UpdateStatistics((norm,))}, {}, None, None)
    assert list(result) == ["liar"]
    assert words in result["liar"][0][0]
    assert score_of(result["liar"]) == 0.0


def test_short_updates_and_a_fleet_of_two_prove_nothing() -> None:
    tiny = {name: UpdateStatistics((0.001,)) for name in ("a", "b", "c")}
    assert concerns_by_client({**tiny, "d": UpdateStatistics((0.09,))}, {}, None, None) == {}
    assert concerns_by_client({"a": UpdateStatistics((0.01,)), "b": UpdateStatistics((0.9,))}, {}, None, None) == {}


def test_records_that_cannot_be_read_lower_the_score_by_their_share() -> None:
    spec = HistogramSpec({}, 3)
    histogram = ClientHistogram("broken", "run-0001", 1, 1000, spec.digest, 10.0, (400, 300, 300, 200, 0, 800))
    result = concerns_by_client({}, {"broken": histogram}, spec, None)
    assert score_of(result["broken"]) == pytest.approx(1 - 0.77)
    client = Client("broken", ClientKind.VIRTUAL, 1000)
    judged = fleet_quality([client], {"broken": Participation(3, 0)}, result).clients[0]
    assert judged.score == pytest.approx(0.23)
    assert "77% of its records are undecodable" in judged.reasons[0]


def after(*scores: float, standing: ValidationStreak | None = None) -> ValidationStreak:
    result = standing or ValidationStreak()
    for score in scores:
        result = result.after(score)
    return result


@pytest.mark.parametrize(
    ("scores", "validated", "verdict"),
    [
        ([0.1], True, None),
        ([0.1, 0.1], True, False),
        ([0.1, 0.9, 0.1], True, None),
        ([0.1, 0.6, 0.1], True, None),
        ([0.1, 0.1], False, None),
        ([0.9] * 4, False, None),
        ([0.9] * 5, False, True),
        ([0.9, 0.9, 0.9, 0.9, 0.7, 0.9], False, None),
        ([0.9] * 9, True, None),
    ],
)
def test_a_verdict_takes_its_time(scores: list[float], validated: bool, verdict: bool | None) -> None:
    assert after(*scores).verdict(validated) is verdict


def test_a_score_that_hovers_about_one_bound_changes_nothing_for_ever() -> None:
    draw = np.random.default_rng(4)
    validated, changes, standing = True, 0, ValidationStreak()
    for score in 0.65 + 0.14 * draw.uniform(-1, 1, 1000):
        standing = standing.after(float(score))
        verdict: Any = standing.verdict(validated)
        changes += verdict is not None
        validated = validated if verdict is None else verdict
    assert (validated, changes) == (True, 0)
