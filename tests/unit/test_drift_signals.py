"""Quality and signals, judged from facts alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedvit.drift import signals
from fedvit.drift.quality import client_quality, fleet_quality
from fedvit.types import Client, ClientKind, Participation, utc_now

GOOD = Client("vehicle", ClientKind.VIRTUAL, 40)
NEVER = Participation(0, 0)


@pytest.mark.parametrize(
    ("client", "taken", "score", "words"),
    [
        (GOOD, Participation(10, 0), 1.0, None),
        (GOOD, Participation(10, 4), 0.6, "4 of 10 rounds"),
        (GOOD, Participation(3, 3), 0.0, "3 of 3 rounds"),
        (replace(GOOD, num_examples=2), Participation(10, 0), 0.25, "only 2 records"),
        (replace(GOOD, num_examples=2), Participation(10, 5), 0.125, "only 2 records"),
        (replace(GOOD, num_examples=8), Participation(10, 0), 1.0, None),
        (replace(GOOD, kind=ClientKind.REMOTE), NEVER, 0.5, "never heard"),
        (replace(GOOD, kind=ClientKind.REMOTE, last_seen_at=utc_now()), Participation(1, 0), 1.0, None),
        (replace(GOOD, quarantined_at=utc_now(), quarantine_reason="PB-1"), Participation(9, 0), 0.0, "PB-1"),
        (replace(GOOD, validated=False), Participation(9, 0), 1.0, "not validated"),
        (GOOD, NEVER, None, "no round yet"),
    ],
)
def test_what_speaks_against_a_client_lowers_its_score(
    client: Client, taken: Participation, score: float | None, words: str | None
) -> None:
    result = client_quality(client, taken)
    assert result.score == (None if score is None else pytest.approx(score))
    assert (result.reasons == ()) if words is None else any(words in reason for reason in result.reasons)


def test_the_fleets_score_is_the_mean_of_those_of_whom_something_is_known() -> None:
    fleet = [replace(GOOD, client_id=name) for name in ("new", "fine", "bad", "half")]
    result = fleet_quality(
        fleet, {"fine": Participation(2, 0), "bad": Participation(2, 2), "half": Participation(2, 1), "x": NEVER}
    )
    assert [client.client_id for client in result.clients] == ["bad", "half", "fine", "new"]
    assert (result.score, result.assessed) == (0.5, 3)
    assert (fleet_quality([], {}).score, fleet_quality([GOOD], {}).score) == (None, None)


@pytest.mark.parametrize(
    ("losses", "score"),
    [([0.8, 0.4], 0.0), ([0.8, 0.4, 0.6], 0.5), ([0.4, 0.5], 0.25), ([0.4, 4.0], 1.0), ([0.01, 0.03], 0.2), ([], None)],
)
def test_loss_is_held_against_the_best_of_its_run(losses: list[float], score: float | None) -> None:
    signal = signals.loss_signal(losses)
    assert signal.score == (None if score is None else pytest.approx(score))
    assert (signal.value, signal.reference) == ((losses[-1], min(losses)) if losses else (None, None))


def test_the_index_is_that_of_the_books() -> None:
    # Large counts, so that the half counts do not matter: (0.6-0.5)ln(0.6/0.5) + (0.4-0.5)ln(0.4/0.5).
    expected = 0.1 * math.log(1.2) - 0.1 * math.log(0.8)
    assert signals.stability_index([5e9, 5e9], [6e9, 4e9]) == pytest.approx(expected, rel=1e-6)
    assert signals.stability_index([3, 7], [30, 70]) == pytest.approx(0, abs=1e-2)
    assert math.isfinite(signals.stability_index([0, 10], [1000, 0]))


def test_too_few_answers_tell_nothing_and_that_is_said() -> None:
    few = signals.mix_signal({0: 99}, [50, 50])
    assert (few.score, "not enough answers yet: 99" in few.reason) == (None, True)
    assert signals.mix_signal({0: 60, 1: 40}, [50, 50]).score == pytest.approx(0.1, abs=0.05)
    unknown = signals.mix_signal({0: 1000}, None)
    assert (unknown.score, "does not say" in unknown.reason) == (None, True)


def test_an_index_of_a_fifth_is_drift() -> None:
    def mix(share: int) -> signals.Signal:
        return signals.mix_signal({0: share, 1: 100_000 - share}, [50_000, 50_000])

    below, above = mix(71_000), mix(73_000)
    assert below.value is not None
    assert above.value is not None
    assert below.value < 0.2 < above.value
    assert [signals.DriftReport((signal,)).drifting for signal in (below, above)] == [False, True]
    assert mix(100_000).score == 1.0


def test_the_worst_signal_counts_and_silence_is_no_drift() -> None:
    silent = signals.loss_signal([])
    assert (signals.DriftReport((silent,)).score, signals.DriftReport((silent,)).drifting) == (None, False)
    both = signals.DriftReport((silent, signals.loss_signal([0.4, 4.0]), signals.loss_signal([0.4])))
    assert (both.score, both.drifting) == (1.0, True)
