"""Checks of what a workload returns: ids, numbers of examples, weights and evaluations.

Scalars of NumPy and torch are accepted wherever a number is expected.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from fedvit.aggregation.rule import BROADCAST
from fedvit.errors import WorkloadError
from fedvit.types import CLIENT_ID, MAX_EXAMPLES, Client, ClientKind, Evaluation, FloatArray, Weights

_MAX_NAME = 256
_NUMBERS = "biuf"
"""The kinds of NumPy's types that hold real numbers."""


def checked_clients(entries: Callable[[], Iterable[object]]) -> Iterator[Client]:
    """The virtual clients, of the pairs that ``clients()`` yields; there may be a million.

    Raises:
        WorkloadError: an entry is no pair of an id and a number of examples, or, at the end, an id was yielded twice.
    """
    # Eight bytes a client instead of its id.
    hashes = array("q")
    for entry in entries():
        client = _client(entry)
        hashes.append(hash(client.client_id))
        yield client
    values, counts = np.unique(np.frombuffer(hashes, np.int64) if hashes else (), return_counts=True)
    if twice := set(values[counts > 1].tolist()):
        client_id = next(client.client_id for client in map(_client, entries()) if hash(client.client_id) in twice)
        raise WorkloadError(f"clients() yields {client_id!r} twice.", cure="Give every client an id of its own.")


def _client(entry: object) -> Client:
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
        _refuse("clients() yields", entry, "a pair of an id and a number of examples")
    client_id, count = entry
    if not isinstance(client_id, str) or re.fullmatch(CLIENT_ID, client_id) is None:
        _refuse("clients() yields the id", client_id, f"a text that matches {CLIENT_ID}")
    return Client(str(client_id), ClientKind.VIRTUAL, _count(f"clients() yields for {client_id}", count, MAX_EXAMPLES))


def checked_fit(result: object) -> tuple[Weights, int]:
    """The weights and the number of examples that ``fit`` returned; arrays are not checked here.

    Raises:
        WorkloadError: it returned something else.
    """
    if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[0], Mapping):
        _refuse("fit returned", result, "a pair of weights by name and a number of examples")
    return result[0], _count("fit returned as the number of examples", result[1], MAX_EXAMPLES)


def checked_weights(weights: object) -> dict[str, FloatArray]:
    """Copies of initial weights, float32 and C-contiguous.

    Raises:
        WorkloadError: they are no arrays of finite numbers by name, or a name is reserved.
    """
    if not isinstance(weights, Mapping) or not weights:
        _refuse("initial_weights returned", weights, "arrays by name")
    return {_name(name): _array(f"initial_weights returned as {name!r}", value) for name, value in weights.items()}


def checked_evaluation(evaluation: object) -> Evaluation | None:
    """An evaluation of Python's own types; its loss may be infinite or NaN, as that of a model that diverged.

    Raises:
        WorkloadError: it is neither None nor an Evaluation, or a value of it is out of range.
    """
    if evaluation is None:
        return None
    if not isinstance(evaluation, Evaluation):
        _refuse("evaluate returned", evaluation, "a fedvit.types.Evaluation or None")
    recall, rows = evaluation.recall_by_class, [list(row) for row in evaluation.confusion]
    if not isinstance(recall, Mapping):
        _refuse("evaluate returned recall_by_class as", recall, "shares by the name of a class")
    if any(len(row) != len(rows) for row in rows):
        _refuse("evaluate returned confusion as", evaluation.confusion, "as many columns as rows")
    return Evaluation(
        loss=_real("evaluate returned loss as", evaluation.loss),
        accuracy=_share("evaluate returned accuracy as", evaluation.accuracy),
        recall_by_class={str(k): _share(f"evaluate returned the recall of {k!r} as", v) for k, v in recall.items()},
        confusion=tuple(tuple(_count("evaluate returned in confusion", n, 2**63 - 1) for n in row) for row in rows),
        num_examples=_count("evaluate returned num_examples as", evaluation.num_examples, 2**63 - 1),
    )


def _name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or name.startswith(BROADCAST):
        _refuse(
            "initial_weights returned the name", name, f"1 to {_MAX_NAME} characters, not beginning with {BROADCAST!r}"
        )
    return str(name)


def _array(what: str, value: object) -> FloatArray:
    try:
        numbers = np.asarray(value)
    except Exception as error:
        raise WorkloadError(f"{what} what is no array: {error}", cure="Return NumPy arrays.") from None
    if numbers.dtype.kind not in _NUMBERS:
        _refuse(what, numbers.dtype, "an array of real numbers")
    with np.errstate(over="ignore"):
        copy = np.array(numbers, dtype=np.float32, order="C")
    if not np.isfinite(copy).all():
        _refuse(what, "an array with a number that is not finite in float32", "an array of finite numbers")
    return copy


def _scalar(value: Any) -> object:
    """The Python number of a scalar, or of an array or tensor with one element."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError):  # of several elements
        return value


def _count(what: str, value: object, most: int) -> int:
    number = _scalar(value)
    if type(number) is not int or not 0 <= number <= most:
        _refuse(what, value, f"an integer from 0 to {most}")
    return number


def _real(what: str, value: object) -> float:
    number = _scalar(value)
    if type(number) not in (int, float):
        _refuse(what, value, "a number")
    return float(number)  # type: ignore[arg-type]


def _share(what: str, value: object) -> float:
    number = _real(what, value)
    if not 0 <= number <= 1:
        _refuse(what, value, "a number from 0 to 1")
    return number


def _refuse(what: str, value: object, wanted: str) -> NoReturn:
    raise WorkloadError(f"{what} {value!r:.80}.", cure=f"It must be {wanted}.")
