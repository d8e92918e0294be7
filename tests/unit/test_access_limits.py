"""How often somebody may ask or fail, and where it is safe to listen."""

from __future__ import annotations

from typing import Any

import pytest
from raises import raises_naming

from fedvit.access.identity import check_exposure
from fedvit.access.limits import FailureWindow, TokenBuckets, whole_seconds
from fedvit.api.transport import is_loopback
from fedvit.errors import ConfigError
from fedvit.settings import load_settings


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    clock = Clock()
    buckets = TokenBuckets(rate=2, burst=3, clock=clock)
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a") == pytest.approx(0.5)
    clock.now_s += 0.5
    assert buckets.take("a") == 0
    assert buckets.take("a") == pytest.approx(0.5)


def test_a_refused_request_costs_nothing_and_rest_fills_no_more_than_the_burst() -> None:
    clock = Clock()
    buckets = TokenBuckets(rate=1, burst=2, clock=clock)
    assert [buckets.take("a") > 0 for _ in range(50)] == [False, False] + [True] * 48
    clock.now_s += 1
    assert buckets.take("a") == 0
    clock.now_s += 3600
    assert [buckets.take("a") > 0 for _ in range(3)] == [False, False, True]


def test_buckets_are_apart() -> None:
    buckets = TokenBuckets(rate=1, burst=1, clock=Clock())
    assert buckets.take("a") == 0
    assert buckets.take("a") > 0
    assert buckets.take("b") == 0


def test_failures_are_tolerated_up_to_the_limit_and_forgotten_after_the_window() -> None:
    clock = Clock()
    failures = FailureWindow(allowed=2, window_s=60, clock=clock)
    assert failures.fail("a") == 0
    clock.now_s += 10
    assert failures.fail("a") == 0
    assert failures.fail("a") == pytest.approx(50)
    assert failures.fail("b") == 0
    clock.now_s += 50
    assert failures.fail("a") == 0
    assert failures.fail("a") == pytest.approx(10)


@pytest.mark.parametrize("kind", ["buckets", "failures"])
def test_made_up_names_do_not_fill_the_memory(kind: str) -> None:
    buckets, failures = TokenBuckets(1, 1, Clock(), max_names=10), FailureWindow(1, 60, Clock(), max_names=10)
    use = buckets.take if kind == "buckets" else failures.fail
    for i in range(100):
        use(f"name-{i}")
    assert len(buckets) + len(failures) == 10
    assert use("name-99") > 0  # The latest are remembered,
    assert use("name-0") == 0  # the oldest forgotten.


@pytest.mark.parametrize(("wait_s", "expected"), [(0.001, 1), (1, 1), (1.2, 2)])
def test_retry_after_is_whole_seconds(wait_s: float, expected: int) -> None:
    assert whole_seconds(wait_s) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_what_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def check(host: str, **access: Any) -> None:
    check_exposure(load_settings(environ={}, overrides={"serving": {"host": host}, "access": access}))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "fed-server"])
@pytest.mark.parametrize(
    ("access", "cure"),
    [
        ({}, "access.mode"),
        ({"behind_tls_proxy": True}, "access.mode"),
        ({"tls_cert": "c.pem", "tls_key": "k.pem"}, "access.mode"),
        ({"mode": "tokens"}, "behind_tls_proxy"),
    ],
)
def test_listening_for_strangers_without_protection_is_refused(host: str, access: dict[str, Any], cure: str) -> None:
    with raises_naming(ConfigError, "serving.host") as caught:
        check(host, **access)
    assert caught.value.cure is not None
    assert cure in caught.value.cure


def test_listening_for_strangers_with_protection_and_on_loopback_without_is_fine() -> None:
    check("0.0.0.0", mode="tokens", behind_tls_proxy=True)
    check("fed.example", mode="tokens", tls_cert="c.pem", tls_key="k.pem")
    with raises_naming(ConfigError, "serving.host"):
        check("0.0.0.0", mode="tokens", tls_cert="c.pem", tls_key="k.pem")
    check("127.0.0.1")
    check("localhost", mode="tokens")


@pytest.mark.parametrize(
    ("access", "word"),
    [
        ({"tls_cert": "c.pem"}, "tls_key"),
        ({"mode": "open"}, "open_loopback"),
        ({"oidc": {"issuer": "i", "audience": "a"}}, "jwks_path"),
        ({"oidc": {"issuer": "i", "audience": "a", "jwks_url": "http://i/keys"}}, "https"),
        ({"oidc": {"issuer": "i", "audience": "a", "jwks_path": "k", "algorithm": "none"}}, "RS256"),
        ({"oidc": {"issuer": "i", "audience": "a", "jwks_path": "k", "algorithm": "HS256"}}, "RS256"),
    ],
)
def test_contradictory_access_settings_are_refused(access: dict[str, Any], word: str) -> None:
    with raises_naming(ConfigError, word):
        check("127.0.0.1", **access)
