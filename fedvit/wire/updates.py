"""Serialisation of a client's answer: safetensors, with its outcome and weight as JSON in the header."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedvit.errors import UpdateRejectedError
from fedvit.types import ClientOutcome, Encoding
from fedvit.updates import ClientFailures, DecodedUpdate, PartialSum
from fedvit.wire.encoding import Arrays, Shapes, Uniforms, decode_arrays, encode_arrays, names_of

_MADE_BY = "Send what encode_update makes."
_LENGTH_BYTES = 8
_MAX_REASON = 500


def encode_update(update: DecodedUpdate) -> bytes:
    """An answer as bytes; the staleness, which only the receiver knows, is left out."""
    sums = {} if isinstance(update, ClientFailures) else update.weighted_sum
    return save(dict(sorted(sums.items())), metadata=_metadata(update, {}))


def encode_smaller(update: DecodedUpdate, encoding: Encoding, uniforms: Uniforms, top_k_fraction: float) -> bytes:
    """An answer as bytes, its mean update in a smaller form; of a failure, the outcome alone.

    Args:
        uniforms, top_k_fraction: see :func:`fedvit.wire.encoding.encode_arrays`.

    Raises:
        UpdateRejectedError: a value does not fit into the form.
    """
    if isinstance(update, ClientFailures) or not update.total_weight > 0:
        return encode_update(update)
    means = {name: array / update.total_weight for name, array in update.weighted_sum.items()}
    arrays = encode_arrays(means, encoding, uniforms, top_k_fraction)
    return save(
        {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())},
        metadata=_metadata(update, {"encoding": encoding.value}),
    )


def decode_update(content: bytes, *, max_bytes: int, shapes: Shapes | None = None) -> PartialSum:
    """The sum and the outcomes that the bytes claim; update validation checks the claim.

    Args:
        shapes: of the parameters, by name; without them no smaller form can be read.

    Raises:
        UpdateRejectedError: it is too large, no safetensors, its header is not that of an update, or its arrays are not
            of the form that it names.
    """
    if len(content) > max_bytes:
        raise UpdateRejectedError(f"The update has {len(content)} bytes; at most {max_bytes} are accepted.")
    arrays = _load(content)
    try:
        facts = json.loads(_header(content)["__metadata__"]["update"])
        encoding = Encoding(facts["encoding"]) if "encoding" in facts else None
        update = _update(facts)
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UpdateRejectedError("The update does not say whose it is and for which round.", cure=_MADE_BY) from None
    sums = arrays if encoding is None else _decoded(arrays, encoding, shapes, update.total_weight)
    return PartialSum(update.round_index, update.outcomes, sums, update.total_weight, update.within_clip)


def encoding_of(content: bytes) -> str:
    """The encoding of bytes that :func:`decode_update` accepts; ``exact`` where the arrays are not encoded."""
    facts = json.loads(_header(content)["__metadata__"]["update"])
    return str(facts.get("encoding", "exact"))


def _decoded(arrays: Arrays, encoding: Encoding, shapes: Shapes | None, weight: float) -> Arrays:
    if shapes is None:
        raise UpdateRejectedError(f"The update is {encoding.value}, and its model is not known.")
    if unknown := sorted(names_of(arrays, encoding) - shapes.keys()):
        raise UpdateRejectedError(f"The update holds {unknown[0]!r}, which is no parameter of this model.")
    with np.errstate(all="ignore"):
        return {name: weight * array for name, array in decode_arrays(arrays, encoding, shapes).items()}


def _load(content: bytes) -> Arrays:
    try:
        return load(content)
    except SafetensorError as error:
        raise UpdateRejectedError(f"The update is not safetensors: {error}.", cure=_MADE_BY) from None
    except (KeyError, ValueError, TypeError) as error:
        raise UpdateRejectedError(f"The update holds a type that is no number here ({error}).", cure=_MADE_BY) from None


def _metadata(update: DecodedUpdate, more: dict[str, Any]) -> dict[str, str]:
    weight, within_clip = (0.0, 0) if isinstance(update, ClientFailures) else (update.total_weight, update.within_clip)
    facts = {
        "round_index": update.round_index,
        "total_weight": weight,
        "within_clip": within_clip,
        "outcomes": [[o.client_id, o.num_examples, o.error] for o in update.outcomes],
    }
    return {"update": json.dumps(facts | more)}


def _header(content: bytes) -> Any:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    return json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])


def _update(facts: Any) -> PartialSum:
    outcomes = tuple(
        ClientOutcome(
            _typed(name, str), _typed(count, int), None if error is None else _typed(error, str)[:_MAX_REASON]
        )
        for name, count, error in facts["outcomes"]
    )
    round_index, within_clip = _typed(facts["round_index"], int), _typed(facts["within_clip"], int)
    return PartialSum(round_index, outcomes, {}, float(facts["total_weight"]), within_clip)


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
