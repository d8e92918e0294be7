"""The secret stream: repeatable for one release, unrelated for any other, and of the right distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest, norm

from fedvit.errors import StateError
from fedvit.privacy.randomness import SecretStream
from fedvit.privacy.secrets import derive_secret, load_or_create_root_secret

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
    draws = SecretStream(SECRET, "noise", {"n": 1}).normal(200_000)
    assert kstest(draws, norm.cdf).pvalue > 1e-4
    assert abs(draws.std() - 1) < 0.01
    assert np.isfinite(draws).all()


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
    with pytest.raises(ValueError, match="16 bytes is too short"):
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
    with pytest.raises(StateError, match="5 bytes instead of 32"):
        load_or_create_root_secret(tmp_path)
