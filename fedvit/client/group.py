"""What the groups of routes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from fedvit.client.caller import Caller

T = TypeVar("T")
PAGE = 500


class Group:
    """Some routes of one control API."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller


def pages(read: Callable[[int, int], Sequence[T]], page_size: int) -> Iterator[T]:
    """Everything that ``read(limit, offset)`` hands out page by page."""
    offset = 0
    while page := read(page_size, offset):
        yield from page
        if len(page) < page_size:
            return
        offset += len(page)
