"""Admission control: a caller's limit, the shares of devices and operators, bytes of bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fedvit.access.identity import ANONYMOUS, Identity, Scope
from fedvit.config import AccessConfig
from fedvit.errors import OverloadedError, RateLimitedError
from serve_apps.control.http import admission as admission_module
from serve_apps.control.http.admission import Admission, Slot

BIG = 100_000


def device(number: int) -> Identity:
    return Identity(f"token:{number}", frozenset({Scope.DEVICE}), authenticated=True)


def operator(number: int = 0) -> Identity:
    return Identity(f"operator:{number}", frozenset({Scope.OPERATOR}), authenticated=True)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


async def enter(admission: Admission, who: Identity, body_bytes: int = 0) -> Slot:
    return await admission.enter(who, "10.0.0.1", body_bytes)


@pytest.fixture
def small() -> Admission:
    limits = {"max_requests_per_caller": 2, "max_device_requests": 4, "max_operator_requests": 2}
    return Admission(
        AccessConfig(**limits, max_body_bytes_per_caller=3 * BIG, max_device_body_bytes=5 * BIG)  # type: ignore[arg-type]
    )


def test_a_caller_has_its_limit_and_gets_it_back(small: Admission) -> None:
    async def work() -> None:
        slots = [await enter(small, device(1)) for _ in range(2)]
        with pytest.raises(RateLimitedError) as refused:
            await enter(small, device(1))
        assert refused.value.details["retry_after_s"] == 1
        await enter(small, device(2))
        slots[0].release()
        slots[0].release()
        await enter(small, device(1))
        with pytest.raises(RateLimitedError):
            await enter(small, device(1))

    run(work())


def test_devices_that_use_all_their_share_leave_the_operators_theirs(
    small: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "WAIT_S", 0.01)

    async def work() -> None:
        held = [await enter(small, device(number)) for number in range(4)]
        with pytest.raises(OverloadedError) as refused:
            await enter(small, device(9))
        assert refused.value.details["retry_after_s"] == 1
        await enter(small, operator())
        held.pop().release()
        await enter(small, device(9))

    run(work())


def test_a_short_request_waits_for_its_share_and_a_long_one_does_not(small: Admission) -> None:
    async def work() -> None:
        held = [await enter(small, device(number)) for number in range(4)]
        waiting = asyncio.create_task(enter(small, device(9)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await enter(small, device(8), BIG)
        held[0].release()
        await waiting
        waiting.result().release()

    run(work())


def test_the_number_that_waits_is_bounded_and_who_gives_up_leaves_nothing_behind(small: Admission) -> None:
    async def work() -> None:
        held = [await enter(small, operator(number)) for number in range(2)]
        waiting = [asyncio.create_task(enter(small, operator(10 + number))) for number in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await enter(small, operator(99))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for slot in held:
            slot.release()
        for number in (10, 10):
            await enter(small, operator(number))

    run(work())


def test_bytes_are_bounded_for_a_caller_and_for_all_devices_but_one_body_always_fits(small: Admission) -> None:
    async def work() -> None:
        await enter(small, device(1), 2 * BIG)
        with pytest.raises(RateLimitedError):
            await enter(small, device(1), 2 * BIG)
        await enter(small, device(1), BIG)
        with pytest.raises(OverloadedError):
            await enter(small, device(2), 3 * BIG)
        slot = await enter(small, device(2), 2 * BIG)
        slot.release()
        await enter(small, operator(), 1000 * BIG)

    run(work())


def test_without_tokens_all_programs_are_one_caller_that_only_the_share_limits(small: Admission) -> None:
    async def work() -> None:
        slots = [await enter(small, ANONYMOUS) for _ in range(2)]
        waiting = asyncio.create_task(enter(small, ANONYMOUS))
        await asyncio.sleep(0)
        slots[0].release()
        await waiting

    run(work())
