"""Assertion that an error has a type and names its subject."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_naming(kind: type[Exception], *names: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expect an error of this kind whose message has these names of files, fields or values."""
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert [name for name in names if name not in message] == []
