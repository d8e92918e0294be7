"""Cache of rendered responses, valid while nothing that they show has changed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import datetime

MAX_PAGES = 32


@dataclass(frozen=True, slots=True)
class Page:
    """A rendered response. ``good_until`` is when it expires even if nothing is written; None is never."""

    body: bytes
    good_until: datetime | None = None


class Pages:
    """The last :data:`MAX_PAGES` pages.

    Args:
        mark: returns a value that changes whenever something changed that a page may show; called at every request.
        now: the present moment.
    """

    def __init__(self, mark: Callable[[], Hashable], now: Callable[[], datetime]) -> None:
        self._mark, self._now = mark, now
        self._pages: OrderedDict[Hashable, tuple[Hashable, Page]] = OrderedDict()
        self._lock, self._rendering = threading.Lock(), threading.Lock()

    def find(self, key: Hashable) -> bytes | None:
        """The page, if it is still valid; blocks on nothing."""
        mark = self._mark()
        with self._lock:
            page_mark, page = self._pages.get(key, (None, Page(b"")))
            if page_mark != mark or (page.good_until is not None and page.good_until < self._now()):
                return None
            self._pages.move_to_end(key)
            return page.body

    def render(self, key: Hashable, make: Callable[[], Page]) -> bytes:
        """The page, rendered again where it has to be. Of several callers one renders it and the others wait."""
        with self._rendering:
            body = self.find(key)
            if body is not None:
                return body
            # Read before the page is rendered: what is written meanwhile makes it an old one.
            mark = self._mark()
            page = make()
            with self._lock:
                self._pages[key] = mark, page
                self._pages.move_to_end(key)
                if len(self._pages) > MAX_PAGES:
                    self._pages.popitem(last=False)
            return page.body
