"""Bounded reading of bytes that anybody may have written: strict JSON, checks of its values, one form of error.

A length is checked before anything is parsed. JSON of n bytes takes at most :data:`JSON_FACTOR` * n bytes of memory.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from fedvit.errors import FedvitError, UpdateRejectedError

_LOG = logging.getLogger(__name__)
JSON_FACTOR = 48
MAX_DEPTH = 8
MAX_REASON = 500
"""The most characters that are kept of a reason that a client gave, or caused."""
_MAX_DIGITS, _MAX_NUMBER = 20, 40


@contextmanager
def errors_as_rejection(subject: str) -> Iterator[None]:
    """Make every error in the block, which reads the bytes of one client, a rejection of these bytes.

    A fault of the program is logged with its traceback. Errors of fedvit and of the operating system pass: they are not
    about the bytes.

    Raises:
        UpdateRejectedError: instead of any other error.
    """
    try:
        yield
    except (FedvitError, OSError):
        raise
    except Exception as error:
        _LOG.exception("%s cannot be read", subject)
        raise UpdateRejectedError(f"{subject} cannot be read ({type(error).__name__}).") from error


def parse_json(content: bytes, *, max_bytes: int) -> Any:
    """The value of JSON in UTF-8: no field twice, at most 20 digits in an integer, finite numbers, eight levels.

    Raises:
        ValueError: it is larger than ``max_bytes``, or no such JSON.
    """
    if len(content) > max_bytes:
        raise ValueError(f"it has {len(content)} bytes; at most {max_bytes} are read")
    try:
        value = json.loads(
            content.decode("utf-8"),
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if b"\\u" in content:
        # Half of a surrogate pair is no text: it could not be stored.
        json.dumps(value, ensure_ascii=False).encode()
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError("it nests too deeply")
    return value


def integer(value: object, low: int, high: int) -> int:
    """The value, if it is an integer from ``low`` to ``high``; else ValueError is raised."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r:.40} is no integer from {low} to {high}")
    return value


def number(value: object, low: float, high: float) -> float:
    """The value, if it is a number from ``low`` to ``high``; else ValueError is raised."""
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{value!r:.40} is no number from {low:g} to {high:g}")
    return float(value)  # type: ignore[arg-type]


def text(value: object, max_length: int) -> str:
    """The value, if it is a text of at most ``max_length`` characters; else ValueError is raised."""
    if not isinstance(value, str) or len(value) > max_length:
        raise ValueError(f"{value!r:.40} is no text of at most {max_length} characters")
    return value


def fields_of(value: object, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """The value, if it is an object with exactly these fields; else ValueError is raised."""
    if not isinstance(value, dict) or not set(required) <= value.keys() <= {*required, *optional}:
        raise ValueError(f"it is no object of the fields {', '.join(sorted(required))}")
    return value


def one_line(words: str) -> str:
    """The first :data:`MAX_REASON` characters of a text, with spaces instead of control characters."""
    return "".join(character if character.isprintable() else " " for character in words[:MAX_REASON])


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits) if len(digits) <= _MAX_NUMBER else math.inf
    if not math.isfinite(value):
        raise ValueError(f"{digits:.40} is no number that is read here")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field appears twice")
    return fields


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels + 1):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: Any) -> Collection[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()
