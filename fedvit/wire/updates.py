"""Serialisation of a client's answer: safetensors, with its outcome and weight as JSON in the header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from fedvit.errors import UpdateRejectedError
from fedvit.types import MAX_EXAMPLES, MAX_ROUND, ClientOutcome, Encoding
from fedvit.updates import ClientFailures, PartialSum, WeightedUpdate
from fedvit.wire.encoding import Arrays, Shapes, Uniforms, decode_arrays, encode_arrays, names_of
from fedvit.wire.tensors import LENGTH_BYTES, MAX_HEADER_BYTES, MAX_TENSORS, TensorFile, read_tensors
from fedvit.wire.untrusted import fields_of, integer, number, one_line, parse_json, text

MOST_COPIES = 4
"""The most float64 copies of the model that decoding allocates at a time, its result among them."""
_MAX_CLIENT_ID, _MAX_ERROR = 64, 8_192
_MAX_FACTS_BYTES = 16_384
_REQUIRED, _OPTIONAL = {"round_index", "total_weight", "within_clip", "outcomes"}, {"encoding"}
# Of one array in the header: its type, its offsets, and the ending of its name; then each length of its shape.
_ENTRY_BYTES, _DIMENSION_BYTES = 128, 16
_ARRAYS_OF_A_PARAMETER = 2
_BYTES_OF_A_VALUE = 8
# A few arrays more than there can be are still read, so that the fault names the one too many.
_SPARE_ARRAYS = 4


def encode_update(update: ClientFailures | WeightedUpdate) -> bytes:
    """An answer as bytes; the staleness, which only the receiver knows, is left out."""
    sums = {} if isinstance(update, ClientFailures) else update.total()
    return save(dict(sorted(sums.items())), metadata=_metadata(update, {}))


def encode_smaller(
    update: ClientFailures | WeightedUpdate, encoding: Encoding, uniforms: Uniforms, top_k_fraction: float
) -> bytes:
    """An answer as bytes, its mean update in a smaller form; of a failure, the outcome alone.

    Args:
        uniforms, top_k_fraction: see :func:`fedvit.wire.encoding.encode_arrays`.

    Raises:
        UpdateRejectedError: a value does not fit into the form.
    """
    if isinstance(update, ClientFailures) or not update.total_weight > 0:
        return encode_update(update)
    means = {name: array / update.total_weight for name, array in update.total().items()}
    arrays = encode_arrays(means, encoding, uniforms, top_k_fraction)
    return save(
        {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())},
        metadata=_metadata(update, {"encoding": encoding.value}),
    )


def largest_update(shapes: Shapes) -> int:
    """The most bytes that an update of a model with these parameters can have, in any encoding."""
    return LENGTH_BYTES + _largest_header(shapes) + _BYTES_OF_A_VALUE * sum(map(math.prod, shapes.values()))


def decode_update(content: bytes, *, max_bytes: int, shapes: Shapes | None = None) -> PartialSum:
    """The sum and the outcomes that the bytes claim; update validation checks the claim.

    Args:
        max_bytes: the largest length that is read.
        shapes: of the parameters, by name; without them no smaller form can be read. With them, nothing is read that
            is larger than :func:`largest_update`, and at most :data:`MOST_COPIES` of the model are allocated.

    Raises:
        UpdateRejectedError: it is too large, no safetensors, its header is not that of an update, or its arrays are not
            of the form that it names.
    """
    return decode_claim(content, max_bytes=max_bytes, shapes=shapes)[0]


def decode_claim(content: bytes, *, max_bytes: int, shapes: Shapes | None = None) -> tuple[PartialSum, str]:
    """:func:`decode_update`, and the name of the encoding; ``exact`` where the arrays are not encoded."""
    limit = max_bytes if shapes is None else min(max_bytes, largest_update(shapes))
    if len(content) > limit:
        raise UpdateRejectedError(f"The update has {len(content)} bytes; at most {limit} are accepted.")
    file = read_tensors(
        content,
        max_tensors=MAX_TENSORS if shapes is None else _ARRAYS_OF_A_PARAMETER * len(shapes) + _SPARE_ARRAYS,
        max_header_bytes=MAX_HEADER_BYTES if shapes is None else _largest_header(shapes),
    )
    try:
        update, encoding = _facts(file.metadata)
    except ValueError as error:
        fault = f"The update does not say whose it is and for which round: {error}."
        raise UpdateRejectedError(fault, cure="Send what encode_update makes.") from None
    sums: Arrays
    if encoding is None:
        sums = {name: np.array(array) for name, array in file.arrays.items()}
    else:
        sums = _decoded(file, encoding, shapes, update.total_weight)
    claim = PartialSum(update.round_index, update.outcomes, sums, update.total_weight, update.within_clip)
    return claim, "exact" if encoding is None else encoding.value


def _decoded(file: TensorFile, encoding: Encoding, shapes: Shapes | None, weight: float) -> Arrays:
    if shapes is None:
        raise UpdateRejectedError(f"The update is {encoding.value}, and its model is not known.")
    if unknown := sorted(names_of(file.arrays, encoding) - shapes.keys()):
        raise UpdateRejectedError(f"The update holds {unknown[0]!r}, which is no parameter of this model.")
    with np.errstate(all="ignore"):
        sums = decode_arrays(file.arrays, encoding, shapes)
        for array in sums.values():
            array *= weight
    return sums


def _largest_header(shapes: Shapes) -> int:
    entries = sum(
        len(json.dumps(name)) + _ENTRY_BYTES + _DIMENSION_BYTES * len(shape) for name, shape in shapes.items()
    )
    # The facts are text within text, so that each of their quotes and backslashes is written as two characters.
    return min(MAX_HEADER_BYTES, 2 * _MAX_FACTS_BYTES + _ENTRY_BYTES + _ARRAYS_OF_A_PARAMETER * entries)


def _metadata(update: ClientFailures | WeightedUpdate, more: dict[str, Any]) -> dict[str, str]:
    weight, within_clip = (0.0, 0) if isinstance(update, ClientFailures) else (update.total_weight, update.within_clip)
    facts = {
        "round_index": update.round_index,
        "total_weight": weight,
        "within_clip": within_clip,
        "outcomes": [
            [o.client_id, o.num_examples, None if o.error is None else one_line(o.error)] for o in update.outcomes
        ],
    }
    return {"update": json.dumps(facts | more)}


def _facts(metadata: Mapping[str, str]) -> tuple[PartialSum, Encoding | None]:
    """The update without its arrays; raises ValueError where a fact is missing, unknown or out of range."""
    content = fields_of(metadata, {"update"})["update"].encode()
    facts = fields_of(parse_json(content, max_bytes=_MAX_FACTS_BYTES), _REQUIRED, _OPTIONAL)
    if not isinstance(facts["outcomes"], list):
        raise ValueError("its outcomes are no list")
    outcomes = tuple(_outcome(outcome) for outcome in facts["outcomes"])
    round_index, within_clip = integer(facts["round_index"], 0, MAX_ROUND), facts["within_clip"]
    weight = number(facts["total_weight"], 0.0, float(MAX_EXAMPLES))
    encoding = Encoding(text(facts["encoding"], 16)) if "encoding" in facts else None
    return PartialSum(round_index, outcomes, {}, weight, integer(within_clip, 0, len(outcomes))), encoding


def _outcome(outcome: object) -> ClientOutcome:
    if not isinstance(outcome, list) or len(outcome) != 3:
        raise ValueError("an outcome is no list of client, examples and error")
    client_id, count, error = outcome
    words = None if error is None else one_line(text(error, _MAX_ERROR))
    return ClientOutcome(text(client_id, _MAX_CLIENT_ID), integer(count, 0, MAX_EXAMPLES), words)
