"""Privacy spend as data: it survives the ledger, and nothing that is unknown passes for something known."""

from __future__ import annotations

import math

import pytest

from fedvit.errors import ConfigError, StateError
from fedvit.privacy.epsilon import epsilon_pld, epsilon_rdp
from fedvit.privacy.events import (
    BandedGaussian,
    Composed,
    Event,
    Gaussian,
    PoissonGaussian,
    Repeated,
    SampledTogether,
    event_from_json,
    event_to_json,
    simplified,
)

EVENTS: list[Event] = [
    Gaussian(1.5),
    PoissonGaussian(1.1, 0.3),
    SampledTogether(0.25, (Gaussian(1.2), Gaussian(10.0))),
    BandedGaussian(2.0, 4, 6),
    Composed((Gaussian(2.0), Repeated(PoissonGaussian(3.0, 0.1), 7))),
    Repeated(Composed((Gaussian(0.1 + 0.2), Gaussian(1e-3))), 12),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_the_ledger_bit_for_bit(event: Event) -> None:
    text = event_to_json(event)
    assert event_from_json(text) == event
    assert event_to_json(event_from_json(text)) == text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"kind":"laplace","noise_multiplier":1.0}', "laplace"),
        ('{"kind":"gaussian","noise_multiplier":1.0,"sensitivity":2.0}', "sensitivity"),
        ('{"kind":"repeated","count":2,"event":{"kind":"shuffled","of":3}}', "shuffled"),
        ('{"kind":"sampled_together","sampling_prob":0.5,"events":[{"kind":"poisson_gaussian",'
         '"noise_multiplier":1.0,"sampling_prob":0.5}]}', "poisson_gaussian"),
        ('["gaussian"]', "gaussian"),
        ("no json", "no json"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(StateError, match=named):
        event_from_json(text)


def test_an_accountant_refuses_an_event_of_another_kind_by_name() -> None:
    class Shuffled:
        pass

    for epsilon in (epsilon_pld, epsilon_rdp):
        with pytest.raises(ConfigError, match="Shuffled"):
            epsilon({Shuffled(): 1}, 1e-5)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gaussian(0.0),
        lambda: Gaussian(math.inf),
        lambda: PoissonGaussian(1.0, 0.0),
        lambda: SampledTogether(1.5, (Gaussian(1.0),)),
        lambda: SampledTogether(0.5, ()),
        lambda: BandedGaussian(1.0, 4, 3),
        lambda: BandedGaussian(1.0, 0, 3),
        lambda: Composed(()),
        lambda: Repeated(Gaussian(1.0), 0),
    ],
)
def test_an_impossible_event_cannot_be_said(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


def test_what_was_not_sampled_adds_up_to_one_gaussian() -> None:
    (event,) = simplified({Gaussian(3.0): 1, BandedGaussian(4.0, 2, 2): 1, PoissonGaussian(12.0, 1.0): 1})
    assert isinstance(event, Gaussian)
    assert event.noise_multiplier**-2 == pytest.approx(3.0**-2 + 4.0**-2 + 12.0**-2)


def test_nested_events_are_counted_out() -> None:
    inner = Repeated(PoissonGaussian(3.0, 0.1), 7)
    assert simplified({Composed((inner, inner)): 2, PoissonGaussian(3.0, 0.1): 1}) == {PoissonGaussian(3.0, 0.1): 29}


def test_mechanisms_on_one_sample_cost_more_than_on_samples_of_their_own() -> None:
    together = SampledTogether(0.1, (Gaussian(2.0), Gaussian(2.0)))
    apart = {PoissonGaussian(2.0, 0.1): 2}
    ((event, times),) = simplified({together: 1}).items()
    assert isinstance(event, PoissonGaussian)
    assert (event.noise_multiplier, event.sampling_prob, times) == (pytest.approx(2.0 / math.sqrt(2)), 0.1, 1)
    assert epsilon_pld({together: 1}, 1e-5) > epsilon_pld(apart, 1e-5)
