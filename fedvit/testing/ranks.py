"""Ranks as threads of one process, for tests that inspect the work of each rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from fedvit.errors import StateError
from fedvit.finetune.ranks import Ranks

_Result = TypeVar("_Result")


class _ThreadSum:
    """A sum over threads that blocks until all ranks have contributed."""

    def __init__(self, count: int) -> None:
        self._count, self._changed = count, threading.Condition()
        self._values: dict[int, Tensor] = {}
        self._sums, self._any_left = 0, False

    def sum(self, index: int, values: Tensor) -> None:
        with self._changed:
            number = self._sums
            self._values[index] = values.clone()
            if len(self._values) == self._count:
                self._total = sum((self._values[i] for i in range(1, self._count)), self._values[0])
                self._values, self._sums = {}, number + 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._sums > number or self._any_left)
            if self._sums == number:
                raise StateError(f"Rank {index} waits for sum {number + 1}, and another has left after {number}.")
            values.copy_(self._total)

    def leave(self) -> None:
        with self._changed:
            self._any_left = True
            self._changed.notify_all()


class ThreadRanks(Ranks):
    """One of ``count`` ranks; created by :func:`on_ranks`."""

    def __init__(self, index: int, count: int, thread_sum: _ThreadSum) -> None:
        super().__init__(index, count)
        self._thread_sum = thread_sum

    def sum(self, values: Tensor) -> None:
        """Wait until all ranks have contributed their values.

        Raises:
            StateError: another rank has ended without: the ranks do not take the same number of steps.
        """
        self._thread_sum.sum(self.index, values)


def on_ranks(count: int, work: Callable[[Ranks], _Result]) -> list[_Result]:
    """What ``work`` returns on each of ``count`` ranks, by index.

    Raises:
        Exception: the first one that a rank raised.
    """
    thread_sum = _ThreadSum(count)

    def one(index: int) -> _Result:
        try:
            return work(ThreadRanks(index, count, thread_sum))
        finally:
            thread_sum.leave()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
