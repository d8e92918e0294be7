"""Whole sessions of secure aggregation: random dropouts, hostile servers, and what a server sees."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from scipy import stats

from fedvit.errors import SecureAggregationError, UpdateRejectedError
from fedvit.secagg import messages
from fedvit.secagg.masks import Ring
from fedvit.secagg.server import Phase
from tests.secure_site import AFTER_SUM, BEFORE_SUM, Site, parameters_of, site_of

FULL = os.environ.get("SECAGG") == "full"
PARTS, SCHEDULES = (10, 100) if FULL else (1, 12)


@pytest.mark.parametrize("part", range(PARTS))
def test_the_sum_is_exact_or_the_session_fails_closed(part: int) -> None:
    """With any dropouts, up to 30% in each phase."""
    rng, summed = np.random.default_rng(part), 0
    for schedule in range(SCHEDULES):
        session = f"{part:032x}{schedule:032x}"
        site = Site(parameters_of(int(rng.integers(5, 61)), session=session), rng)
        try:
            _run(site, _sometimes(rng, float(rng.uniform(0, 0.3))))
        except SecureAggregationError:
            assert site.server.phase is Phase.FAILED
            with pytest.raises(SecureAggregationError):
                site.server.total()
        else:
            summed += 1
            assert len(site.server.survivors) >= site.parameters.min_survivors
            np.testing.assert_array_equal(site.server.total(), site.plain_sum())
    assert summed > SCHEDULES / 10


def _run(site: Site, silent: Callable[[str], bool], *phases: Phase) -> None:
    for phase in phases or (*BEFORE_SUM, Phase.MASK, *AFTER_SUM):
        site.exchange(phase, silent)


def test_masked_vectors_are_uniform() -> None:
    """To chi-square and Kolmogorov-Smirnov tests, which find it where 1% of the values (short form: 8%) are halved."""
    length = 10**7 if FULL else 10**5
    site = site_of(3, length=length)
    site.run(*BEFORE_SUM)
    client_id, request = next(iter(site.server.requests().items()))
    masked = site.clients[client_id].mask(request, np.zeros(length, np.uint32))
    assert _is_uniform(masked)
    biased = np.where(np.random.default_rng(0).random(length) < (0.01 if FULL else 0.08), masked >> 1, masked)
    assert not _is_uniform(biased.astype(np.uint32))
    assert not _is_uniform(np.where(biased == masked, masked & ~np.uint32(1), masked))


def _is_uniform(vector: Ring) -> bool:
    # The upper, the middle and the lower bits of 20.
    cells = [np.bincount(vector >> shift & 255, minlength=256) for shift in (12, 6, 0)]
    spread = stats.kstest((vector + 0.5) / 2**20, "uniform").pvalue
    return bool(min(stats.chisquare(each).pvalue for each in cells) > 1e-6 and spread > 1e-6)


def test_a_seed_of_32_bits_would_be_found() -> None:
    """The attack that it allows succeeds within a part of the seeds, and finds nothing against the masks used here."""
    site, seeds = site_of(3, length=64), range(20_000 if FULL else 2_000)
    site.run(*BEFORE_SUM)
    client_id, request = next(iter(site.server.requests().items()))
    vector = np.arange(64, dtype=np.uint32)
    weak = (vector + _weak_mask(1_703)) % 2**20
    strong = site.clients[client_id].mask(request, vector)
    assert [seed for seed in seeds if _looks_plain((weak - _weak_mask(seed)) % 2**20)] == [1_703]
    assert not any(_looks_plain((strong - _weak_mask(seed)) % 2**20) for seed in seeds)


def _weak_mask(seed: int) -> Ring:
    return np.random.RandomState(seed).randint(0, 2**20, 64).astype(np.uint32)


def _looks_plain(vector: Ring) -> bool:
    return int(vector.max()) < 2**10


def test_no_pair_of_secrets_of_a_client_is_given() -> None:
    """Whatever sets of survivors the server names and forwards, all shares of an owner are of one secret."""
    rng, given = np.random.default_rng(3), 0
    for schedule in range(50 if FULL else 10):
        site = Site(parameters_of(int(rng.integers(8, 20)), session=f"{schedule:064x}", min_survivors=2), rng)
        with suppress(SecureAggregationError):
            _run(site, _sometimes(rng, 0.1), *BEFORE_SUM, Phase.MASK)
        survivors = list(site.server.survivors)
        sets = [survivors, survivors[1:], survivors[:-1], list(site.parameters.participants)]
        transcript = {client_id: _confirmations(site, client_id, sets, rng) for client_id in survivors}
        secrets: dict[str, set[str]] = {}
        for client_id in survivors:
            for number in rng.permutation(len(sets)):
                for owner in _shares(site, client_id, transcript, int(number)):
                    given += 1
                    secrets.setdefault(owner, set()).add("seed" if owner in sets[number] else "key")
        assert [owner for owner, kinds in secrets.items() if len(kinds) > 1] == []
    assert given


def _confirmations(site: Site, client_id: str, sets: list[list[str]], rng: np.random.Generator) -> dict[int, str]:
    """The client's signatures, by the set: the server asks for all sets, most often for the first one first."""
    order, signed = list(range(len(sets))), dict[int, str]()
    if rng.random() < 0.2:
        rng.shuffle(order)
    for number in order:
        request = messages.encode("survivors", messages.survivors_to_json(site.parameters, sets[number]))
        with suppress(SecureAggregationError):
            answer = site.clients[client_id].confirm(request)
            signed[number] = messages.decode(answer, "signature", site.parameters)
    return signed


def _shares(site: Site, client_id: str, transcript: dict[str, dict[int, str]], number: int) -> list[str]:
    """Whose shares the client gives for what the server knows of confirmations of this set."""
    confirmers = site.parameters.confirmers
    signed = {c: transcript[c][number] for c in confirmers if number in transcript.get(c, {})}
    try:
        answer = site.clients[client_id].unmask(messages.encode("confirmations", signed))
    except (SecureAggregationError, UpdateRejectedError):
        return []
    return list(messages.decode(answer, "shares", site.parameters))


def test_another_set_is_not_unmasked() -> None:
    site = site_of(5)
    site.run(*BEFORE_SUM, Phase.MASK, Phase.CONFIRM)
    request = site.server.requests()["vehicle-000"]
    signed = messages.decode(request, "confirmations", site.parameters)
    signed["vehicle-001"], signed["vehicle-002"] = signed["vehicle-002"], signed["vehicle-001"]
    with pytest.raises(SecureAggregationError):
        site.clients["vehicle-000"].unmask(messages.encode("confirmations", signed))
    few = dict(list(signed.items())[: site.parameters.threshold - 1])
    with pytest.raises(SecureAggregationError):
        site.clients["vehicle-003"].unmask(messages.encode("confirmations", few))


def _sometimes(rng: np.random.Generator, rate: float) -> Callable[[str], bool]:
    return lambda _: bool(rng.random() < rate)
