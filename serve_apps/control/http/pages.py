"""Rendered answers that are sent again for as long as they are still the truth."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import datetime

MAX_PAGES = 32


@dataclass(frozen=True, slots=True)
class Page:
    """A rendered answer. ``good_until`` is when it stops being true even if nothing is written; None is never."""

    body: bytes
    good_until: datetime | None = None


class Pages:
    """Keeps the last :data:`MAX_PAGES` pages.

    Args:
        mark: a value that changes whenever something changed that a page may show; asked at every request.
        now: the present moment.
    """

    def __init__(self, mark: Callable[[], Hashable], now: Callable[[], datetime]) -> None:
        self._mark, self._now = mark, now
        self._kept: OrderedDict[Hashable, tuple[Hashable, Page]] = OrderedDict()
        self._lock, self._rendering = threading.Lock(), threading.Lock()

    def find(self, key: Hashable) -> bytes | None:
        """The page, if it is still the truth; blocks on nothing."""
        mark = self._mark()
        with self._lock:
            kept_mark, page = self._kept.get(key, (None, Page(b"")))
            if kept_mark != mark or (page.good_until is not None and page.good_until < self._now()):
                return None
            self._kept.move_to_end(key)
            return page.body

    def render(self, key: Hashable, make: Callable[[], Page]) -> bytes:
        """The page, made anew where it has to be; of several callers one makes it and the others wait."""
        with self._rendering:
            found = self.find(key)
            if found is not None:
                return found
            # Asked before anything is read: what is written meanwhile makes the page an old one.
            mark = self._mark()
            page = make()
            with self._lock:
                self._kept[key] = mark, page
                self._kept.move_to_end(key)
                if len(self._kept) > MAX_PAGES:
                    self._kept.popitem(last=False)
            return page.body
