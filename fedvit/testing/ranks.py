"""Ranks that are threads of one process, so that what each of them does can be looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from fedvit.errors import StateError
from fedvit.finetune.ranks import Ranks

_Found = TypeVar("_Found")


class _Table:
    """Where the ranks meet for a sum."""

    def __init__(self, count: int) -> None:
        self._count, self._met = count, threading.Condition()
        self._given: dict[int, Tensor] = {}
        self._sums, self._somebody_left = 0, False

    def sum(self, index: int, values: Tensor) -> None:
        with self._met:
            number = self._sums
            self._given[index] = values.clone()
            if len(self._given) == self._count:
                self._total = sum((self._given[i] for i in range(1, self._count)), self._given[0])
                self._given, self._sums = {}, number + 1
                self._met.notify_all()
            self._met.wait_for(lambda: self._sums > number or self._somebody_left)
            if self._sums == number:
                raise StateError(f"Rank {index} waits for sum {number + 1}, and another has left after {number}.")
            values.copy_(self._total)

    def leave(self) -> None:
        with self._met:
            self._somebody_left = True
            self._met.notify_all()


class ThreadRanks(Ranks):
    """One of ``count`` ranks; made by :func:`on_ranks`."""

    def __init__(self, index: int, count: int, table: _Table) -> None:
        super().__init__(index, count)
        self._table = table

    def sum(self, values: Tensor) -> None:
        """Wait until all ranks have given theirs.

        Raises:
            StateError: another rank has ended without: the ranks do not take the same number of steps.
        """
        self._table.sum(self.index, values)


def on_ranks(count: int, work: Callable[[Ranks], _Found]) -> list[_Found]:
    """What ``work`` returns on each of ``count`` ranks, by index.

    Raises:
        Exception: the first one that a rank raised.
    """
    table = _Table(count)

    def one(index: int) -> _Found:
        try:
            return work(ThreadRanks(index, count, table))
        finally:
            table.leave()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
