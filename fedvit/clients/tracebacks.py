"""Tracebacks of errors in the code of clients: where it failed, without the frames of fedvit that called it."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[1])
_MAX_LENGTH = 8_000
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)$', re.MULTILINE)
_INSTALLED = ("site-packages", "dist-packages")


def traceback_of(error: BaseException) -> str:
    """The traceback as Python prints it, from the first frame outside of fedvit on; at most 8,000 characters.

    It names files and lines of code, and holds the error's own message.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = next((i for i, frame in enumerate(frames) if not frame.filename.startswith(_PACKAGE)), 0)
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames[own:])]
    text = "".join([*lines, *traceback.format_exception_only(error)])
    # Interned, so that the message of many clients with one error holds it once.
    return sys.intern(text[-_MAX_LENGTH:])


def location_in(text: str) -> str:
    """File, line and function of the last place in a traceback that is in no installed package; empty if none is."""
    places = _FRAME.findall(text)
    own = [place for place in places if not any(part in place[0] for part in _INSTALLED)] or places
    return "" if not own else f"{Path(own[-1][0]).name}, line {own[-1][1]}, in {own[-1][2]}"
