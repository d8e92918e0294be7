"""No part of a secure sum can be unmasked alone: by exhaustion on small rings, and with the server's attacks played."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from math import comb

import numpy as np
import numpy.typing as npt
import pytest

from fedvit.errors import SecureAggregationError, UpdateRejectedError
from fedvit.secagg import messages
from fedvit.secagg.parameters import Parameters, parameters_for
from fedvit.secagg.server import Phase
from tests.secure_site import BEFORE_SUM, Site, parameters_of

# What a client on the ring is to a server that wants the sum of the part alone: in it; another survivor; said to have
# dropped out after it shared; said to have dropped out before; colluding.
PART, OTHER, LOST, GONE, COLLUDING = range(5)
Labels = npt.NDArray[np.int8]
Where = npt.NDArray[np.bool_]


def _near(places: Where, half: int) -> npt.NDArray[np.int64]:
    """How many of these places are at most ``half`` away from each place, itself included."""
    steps = [np.roll(places, step, axis=1) for step in range(-half, half + 1)]
    return np.asarray(np.sum(steps, axis=0, dtype=np.int64))


def _unmasked(labels: Labels, half: int, threshold: int) -> Where:
    """In which of these rings the server can unmask the part alone, with the best choice of what it delivers.

    A client of the part gets no shares of other survivors, or masks with them would remain. So it refuses the set of
    survivors if one of them is its neighbour.
    """
    part, other = labels == PART, labels == OTHER
    shared = _near(part | (labels == LOST) | (labels == COLLUDING), half)
    confirms = other | (part & (_near(other, half) == 0))
    holders = _near(confirms | (labels == COLLUDING), half)
    masks = np.all(~part | (shared >= threshold), axis=1)
    rebuilt = np.all(~(part | (labels == LOST)) | (holders >= threshold), axis=1)
    return np.asarray(masks & rebuilt & part.any(axis=1) & other.any(axis=1))


@pytest.mark.parametrize(("count", "degree"), [(7, 4), (9, 4), (9, 6), (10, 4)])
def test_no_part_is_unmasked_on_any_small_ring(count: int, degree: int) -> None:
    half = degree // 2
    rest = np.array(list(itertools.product(range(5), repeat=count - 1)), np.int8)
    labels = np.hstack([np.full((len(rest), 1), PART, np.int8), rest])
    in_a_row = sum(np.roll(labels == COLLUDING, step, axis=1).astype(int) for step in range(half))
    most = np.max(in_a_row, axis=1)
    for colluding in range(half):
        assert not _unmasked(labels[most <= colluding], half, half + 2 + colluding).any()


@pytest.mark.parametrize("half", [2, 3, 10, 40])
def test_with_a_threshold_of_one_less_a_part_could_be_unmasked(half: int) -> None:
    """Half of the neighbours in a row dropped out or collude, on both sides of the part."""
    for colluding in range(half):
        gap = [COLLUDING] * colluding + [LOST] * (half - colluding)
        ring = np.array([[PART] * 3 * half + gap + [OTHER] * 3 * half + gap], np.int8)
        assert [_unmasked(ring, half, half + more + colluding).item() for more in (1, 2)] == [True, False]


def test_dropouts_that_would_cut_clients_off_fail_the_session() -> None:
    """Their keys would take the masks off the five clients alone; too few clients hold shares of them."""
    names = tuple(f"vehicle-{i:03d}" for i in range(60))
    parameters = Parameters("ab" * 32, names, 8, 6, 42, 20, 8)
    site = Site(parameters, np.random.default_rng(1))
    gap = {*parameters.ring[16:20], *parameters.ring[25:29]}
    site.run(*BEFORE_SUM)
    site.exchange(Phase.MASK, lambda client_id: client_id in gap)
    assert len(site.server.survivors) == 52
    site.exchange(Phase.CONFIRM)
    with pytest.raises(SecureAggregationError, match=r"5 clients gave a share of a secret of .*, and 6 have to"):
        site.exchange(Phase.UNMASK)
    with pytest.raises(ValueError, match="a threshold of 5 is not between 6 and 9"):
        Parameters("ab" * 32, names, 8, 5, 42, 20, 8)


def test_two_halves_whose_shares_are_withheld_from_each_other_are_not_separate_sums() -> None:
    """Nobody is said to have dropped out. Where the halves meet, clients get too few shares and send nothing."""
    parameters = parameters_of(40, dropout_rate=0.1, min_survivors=30)
    site = Site(parameters, np.random.default_rng(1))
    site.run(*BEFORE_SUM)
    half, refused = parameters.ring[:20], set()
    for client_id, request in site.server.requests().items():
        shares = messages.decode(request, "shares", parameters)
        kept = {c: sealed for c, sealed in shares.items() if (c in half) == (client_id in half)}
        try:
            site.clients[client_id].mask(messages.encode("shares", kept), site.vectors[client_id])
        except SecureAggregationError:
            refused.add(client_id)
    assert refused == {parameters.ring[place] for place in (0, 19, 20, 39)}


def _unmasking(site: Site, client_id: str, shown: Sequence[str], signed: dict[str, str]) -> bool:
    """Whether a client that was shown a set unmasks it, whichever of the signatures the server forwards."""
    for forwarded in (site.parameters.confirmers, (client_id, *site.parameters.neighbours_of(client_id))):
        some = {c: signed[c] for c in forwarded if c in signed and c in shown}
        with suppress(SecureAggregationError, UpdateRejectedError):
            site.clients[client_id].unmask(messages.encode("confirmations", some))
            return True
    return False


def test_two_halves_of_the_ring_do_not_unmask_two_sets() -> None:
    """Each half would miss other clients, and the sum would be of fewer clients than either set has."""
    parameters = parameters_of(40, dropout_rate=0.1, min_survivors=30)
    assert parameters.neighbours < 12
    site = Site(parameters, np.random.default_rng(1))
    site.run(*BEFORE_SUM, Phase.MASK)
    halves = parameters.ring[:20], parameters.ring[20:]
    unmask = []
    for half in halves:
        shown = sorted(set(parameters.participants) - set(half[8:12:2]))
        request = messages.encode("survivors", messages.survivors_to_json(parameters, shown))
        signed = {
            c: messages.decode(site.clients[c].confirm(request), "signature", parameters) for c in half if c in shown
        }
        unmask.append(sum(_unmasking(site, c, shown, signed) for c in signed))
    assert sorted(unmask)[0] == 0


def test_the_colluding_clients_that_are_counted_are_never_exceeded() -> None:
    """By the exact hypergeometric distribution; with a lower threshold the bound would not hold."""
    for count, colluding in ((100, 5), (300, 30), (1_000, 100)):
        names = [f"vehicle-{i:04d}" for i in range(count)]
        graph = parameters_for(
            "ab" * 32,
            names,
            min_survivors=count // 2,
            max_colluding=colluding,
            dropout_rate=0.1,
            bits=8,
            length=1,
        )
        half, whole = graph.neighbours // 2, comb(count, graph.neighbours // 2)
        counted = graph.threshold - half - 2

        def exceeded(
            most: int, half: int = half, whole: int = whole, of: tuple[int, int] = (count, colluding)
        ) -> float:
            clients, marked = of
            ways = sum(comb(marked, k) * comb(clients - marked, half - k) for k in range(most + 1, half + 1))
            return clients * float(Fraction(ways, whole))

        assert graph.neighbours < count - 1
        assert exceeded(counted) <= 2.0**-80 < exceeded(counted - 1)
