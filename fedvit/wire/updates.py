"""A client's answer to a round as bytes and back: safetensors, with what else it says as JSON in the header."""

from __future__ import annotations

import json
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedvit.errors import UpdateRejectedError
from fedvit.types import ClientOutcome, PartialUpdate

_MADE_BY = "Send what encode_update makes."
_LENGTH_BYTES = 8


def encode_update(update: PartialUpdate) -> bytes:
    """An answer as bytes; what only the receiver knows (staleness, the norm clipped to) is left out.

    Raises:
        ValueError: it has parts; send each of them.
    """
    if update.parts:
        raise ValueError("an update with parts has no bytes of its own")
    facts = {
        "round_index": update.round_index,
        "total_weight": update.total_weight,
        "within_clip": update.within_clip,
        "outcomes": [[o.client_id, o.num_examples, o.error] for o in update.outcomes],
    }
    return save(dict(sorted(update.weighted_sum.items())), metadata={"update": json.dumps(facts)})


def decode_update(content: bytes, *, max_bytes: int) -> PartialUpdate:
    """The inverse, for bytes that may come from anybody; whether it may count is for the one door to say.

    Raises:
        UpdateRejectedError: it is too large, no safetensors, or its header is not that of an update.
    """
    if len(content) > max_bytes:
        raise UpdateRejectedError(f"The update has {len(content)} bytes; at most {max_bytes} are accepted.")
    try:
        arrays = load(content)
    except SafetensorError as error:
        raise UpdateRejectedError(f"The update is not safetensors: {error}.", cure=_MADE_BY) from None
    except (KeyError, ValueError, TypeError) as error:
        raise UpdateRejectedError(f"The update holds a type that is no number here ({error}).", cure=_MADE_BY) from None
    try:
        return _update(json.loads(_header(content)["__metadata__"]["update"]), arrays)
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UpdateRejectedError("The update does not say whose it is and for which round.", cure=_MADE_BY) from None


def _header(content: bytes) -> Any:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    return json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])


def _update(facts: Any, arrays: Any) -> PartialUpdate:
    outcomes = tuple(
        ClientOutcome(_typed(name, str), _typed(count, int), None if error is None else _typed(error, str))
        for name, count, error in facts["outcomes"]
    )
    round_index, within_clip = _typed(facts["round_index"], int), _typed(facts["within_clip"], int)
    return PartialUpdate(round_index, outcomes, arrays, float(facts["total_weight"]), within_clip)


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
