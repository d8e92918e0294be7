"""Serialisation of a rule's state: safetensors, float64. Equal states give equal bytes."""

from __future__ import annotations

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedvit.aggregation.rule import State
from fedvit.errors import IntegrityError


def encode_state(state: State) -> bytes:
    """A rule's state as bytes, whose hash names it.

    Raises:
        ValueError: an array is not float64; a restart would not continue bit for bit.
    """
    for name, array in state.items():
        if array.dtype != np.float64:
            raise ValueError(f"the rule's state {name!r} is {array.dtype}, not float64")
    return save({name: np.asarray(state[name], order="C") for name in sorted(state)})


def decode_state(content: bytes) -> State:
    """The inverse of :func:`encode_state`.

    Raises:
        IntegrityError: these bytes hold no state.
    """
    try:
        return load(content)
    except SafetensorError as error:
        raise IntegrityError(
            f"A rule's state cannot be read: {error}.", cure="Restore the state folder from a backup."
        ) from None
