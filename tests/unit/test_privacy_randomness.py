"""The secret stream: repeatable for one mechanism output, unrelated for any other, and of the right distribution."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import expon, kstest, norm

from fedvit.errors import StateError
from fedvit.privacy.randomness import SecretStream, derive_secret, load_or_create_root_secret

SECRET = bytes(range(32))


def test_the_same_release_repeats_and_any_other_does_not() -> None:
    first = SecretStream(SECRET, "noise", {"release": "a", "step": 0}).normal(64)
    assert np.array_equal(first, SecretStream(SECRET, "noise", {"step": 0, "release": "a"}).normal(64))
    for secret, purpose, context in [
        (SECRET[::-1], "noise", {"release": "a", "step": 0}),
        (SECRET, "poisson", {"release": "a", "step": 0}),
        (SECRET, "noise", {"release": "b", "step": 0}),
        (SECRET, "noise", {"release": "a", "step": 1}),
    ]:
        other = SecretStream(secret, purpose, context).normal(64)
        assert not np.intersect1d(first, other).size


def test_a_stream_never_repeats_itself() -> None:
    stream = SecretStream(SECRET, "noise", {})
    assert not np.intersect1d(stream.uniform(1000), stream.uniform(1000)).size


def test_normals_are_standard_normal() -> None:
    draws = SecretStream(SECRET, "noise", {"n": 1}).normal(400_001)
    assert len(draws) == 400_001
    assert kstest(draws, norm.cdf).pvalue > 1e-4
    # The variance of the mean of the k-th powers is that of the power over the number of draws.
    for power, moment, variance in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]:
        assert abs((draws**power).mean() - moment) < 5 * np.sqrt(variance / len(draws))
    for bound in (3.0, 4.0):
        expected = 2 * norm.sf(bound) * len(draws)
        assert abs((abs(draws) > bound).sum() - expected) < 5 * np.sqrt(expected)


def test_the_two_normals_of_a_pair_are_independent() -> None:
    pairs = SecretStream(SECRET, "noise", {"n": 2}).normal(400_000).reshape(-1, 2)
    for values in (pairs, pairs**2, abs(pairs)):
        assert abs(np.corrcoef(values.T)[0, 1]) < 5 / np.sqrt(len(pairs))
    assert kstest((pairs**2).sum(axis=1) / 2, expon.cdf).pvalue > 1e-4


class _Given(SecretStream):
    """The stream with its uniforms laid down, so that its corners can be looked at."""

    def __init__(self, uniforms: list[float]) -> None:
        super().__init__(SECRET, "noise", {})
        self._uniforms = np.array(uniforms)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        return self._uniforms[:count]


@pytest.mark.parametrize("angle", [2.0**-54, 0.1, 0.25, 0.5, 0.75, 1 - 2.0**-53])
@pytest.mark.parametrize("radius", [2.0**-54, 1e-9, 0.3, 1 - 2.0**-53])
def test_every_uniform_gives_what_the_formula_says(radius: float, angle: float) -> None:
    turned = 2 * np.pi * (angle - 0.5)
    expected = np.sqrt(-2 * np.log(radius)) * np.array([np.cos(turned), np.sin(turned)])
    normals = _Given([radius, angle]).normal(2)
    np.testing.assert_allclose(normals, expected, rtol=1e-12, atol=1e-14)
    assert abs(normals).max() < 8.66


def test_draws_one_after_another_are_what_one_draw_would_be() -> None:
    whole = SecretStream(SECRET, "noise", {}).normal(100_021)
    stream = SecretStream(SECRET, "noise", {})
    parts = [stream.normal(count) for count in (0, 1, 1, 3, 0, 4097, 2, 1, 65_536, 30_380)]
    assert np.array_equal(np.concatenate([*parts, stream.normal(0)]), whole[: sum(map(len, parts))])
    single = SecretStream(SECRET, "noise", {}).normal(1000, np.float32)
    assert single.dtype == np.float32
    assert np.array_equal(single, whole[:1000].astype(np.float32))


@pytest.mark.parametrize("probability", [0.01, 0.5, 0.97])
def test_coins_are_independent_bernoulli(probability: float) -> None:
    coins = SecretStream(SECRET, "poisson", {"p": probability}).coins(100_000, probability)
    deviation = np.sqrt(probability * (1 - probability) / 100_000)
    assert abs(coins.mean() - probability) < 5 * deviation
    neighbours = np.corrcoef(coins[:-1], coins[1:])[0, 1]
    assert abs(neighbours) < 0.02


def test_a_coin_of_probability_one_always_falls() -> None:
    assert SecretStream(SECRET, "poisson", {}).coins(1000, 1.0).all()


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError):
        SecretStream(bytes(16), "noise", {})


def test_the_root_key_is_made_once_and_kept_private(tmp_path) -> None:  # type: ignore[no-untyped-def]
    root = load_or_create_root_secret(tmp_path)
    assert root == load_or_create_root_secret(tmp_path)
    assert (tmp_path / "keys" / "root.key").stat().st_mode & 0o077 == 0
    assert derive_secret(root, "vehicle-00") != derive_secret(root, "vehicle-01")
    assert [p.name for p in (tmp_path / "keys").iterdir()] == ["root.key"]


def test_a_damaged_root_key_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    load_or_create_root_secret(tmp_path)
    (tmp_path / "keys" / "root.key").write_bytes(b"short")
    with pytest.raises(StateError):
        load_or_create_root_secret(tmp_path)
