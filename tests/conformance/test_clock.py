"""The clock port: the machine's clocks, and the shipped double."""

from __future__ import annotations

from datetime import timedelta

import pytest

from fedvit.clock import SystemClock
from fedvit.ports import ClockPort
from fedvit.testing.doubles import ManualClock


@pytest.fixture(params=[SystemClock, ManualClock])
def clock(request: pytest.FixtureRequest) -> ClockPort:
    result: ClockPort = request.param()
    return result


def test_the_present_moment_has_a_time_zone(clock: ClockPort) -> None:
    assert clock.now().utcoffset() == timedelta(0)


def test_time_never_goes_back(clock: ClockPort) -> None:
    readings = [clock.monotonic() for _ in range(100)]
    assert readings == sorted(readings)
    moments = [clock.now() for _ in range(100)]
    assert moments == sorted(moments)


def test_a_manual_clock_advances_by_hand_alone() -> None:
    clock = ManualClock()
    before, at = clock.monotonic(), clock.now()
    assert (clock.monotonic(), clock.now()) == (before, at)
    clock.advance(90)
    assert (clock.monotonic() - before, clock.now() - at) == (90.0, timedelta(seconds=90))
