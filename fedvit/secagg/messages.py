"""Messages of the protocol: JSON with values in base 64, read with bounds before anything is built of it."""

from __future__ import annotations

import binascii
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedvit.errors import UpdateRejectedError
from fedvit.secagg.parameters import Parameters
from fedvit.wire.untrusted import fields_of, parse_json, text

KEY_BYTES = SHARE_BYTES = 32
SIGNATURE_BYTES = 64
# Two shares, a nonce of 12 bytes and a tag of 16.
SEALED_BYTES = 2 * SHARE_BYTES + 12 + 16
_BYTES_OF_A_CLIENT = 1_000


@dataclass(frozen=True, slots=True)
class Keys:
    """What a client advertises: two public keys, a commitment to the seed of its own mask, and its signature."""

    mask_key: bytes
    share_key: bytes
    commitment: bytes
    signature: bytes

    def signed(self, parameters: Parameters, client_id: str) -> bytes:
        """The bytes that the client signs with its identity key."""
        of = b"fedvit-secagg-keys", parameters.digest.encode(), client_id.encode()
        return b"/".join((*of, self.mask_key, self.share_key, self.commitment))

    def to_json(self) -> list[str]:
        return [written(value) for value in (self.mask_key, self.share_key, self.commitment, self.signature)]

    @classmethod
    def from_json(cls, value: Any) -> Keys:
        """The inverse of :meth:`to_json`; ValueError for anything else."""
        if not isinstance(value, list) or len(value) != 4:
            raise ValueError("it has no four values")
        sizes = (KEY_BYTES, KEY_BYTES, KEY_BYTES, SIGNATURE_BYTES)
        return cls(*(_bytes(part, size) for part, size in zip(value, sizes, strict=True)))


def written(content: bytes) -> str:
    """Bytes as a value of a message."""
    return b64encode(content).decode()


def encode(field: str, value: Any) -> bytes:
    """A message with one field."""
    return json.dumps({field: value}, sort_keys=True, separators=(",", ":")).encode()


def decode(content: bytes, field: str, parameters: Parameters) -> Any:
    """The value of a message's one field.

    Raises:
        UpdateRejectedError: it is no such message.
    """
    try:
        limit = 10_000 + _BYTES_OF_A_CLIENT * len(parameters.participants)
        return fields_of(parse_json(content, max_bytes=limit), [field])[field]
    except ValueError as error:
        raise UpdateRejectedError(f"A message of secure aggregation cannot be read: {error}.") from None


def by_client(value: Any, parse: Callable[[Any], Any], allowed: Sequence[str]) -> dict[str, Any]:
    """An object of values by client id.

    Raises:
        UpdateRejectedError: it is none, names a client that is not ``allowed``, or a value cannot be parsed.
    """
    try:
        if not isinstance(value, dict) or not value.keys() <= set(allowed):
            raise ValueError("it is not about the clients that it may be about")
        return {client_id: parse(part) for client_id, part in value.items()}
    except ValueError as error:
        raise UpdateRejectedError(f"A message of secure aggregation is not valid: {error}.") from None


def of_size(size: int) -> Callable[[Any], bytes]:
    """The inverse of :func:`written` for so many bytes; ValueError for anything else."""
    return lambda value: _bytes(value, size)


def survivors_to_json(parameters: Parameters, survivors: Sequence[str]) -> str:
    """A set of participants, as the bits of a hexadecimal number."""
    return f"{sum(1 << parameters.index[client_id] for client_id in survivors):x}"


def survivors_of(parameters: Parameters, value: Any) -> tuple[str, ...]:
    """The inverse of :func:`survivors_to_json`, sorted.

    Raises:
        UpdateRejectedError: it is none.
    """
    try:
        marked = int(text(value, len(parameters.participants)), 16)
        if marked < 0 or marked >> len(parameters.participants):
            raise ValueError("it names clients that do not take part")
        if f"{marked:x}" != value:
            raise ValueError("it is not in its shortest form")
    except ValueError as error:
        raise UpdateRejectedError(f"A set of survivors cannot be read: {error}.") from None
    return tuple(client_id for client_id, i in parameters.index.items() if marked >> i & 1)


def confirmed(parameters: Parameters, client_id: str, survivors: Sequence[str]) -> bytes:
    """The bytes with which a client confirms a set of survivors."""
    of = survivors_to_json(parameters, survivors)
    return b"/".join((b"fedvit-secagg-survivors", parameters.digest.encode(), client_id.encode(), of.encode()))


def is_signed(peers: Mapping[str, Ed25519PublicKey], client_id: str, signature: bytes, content: bytes) -> bool:
    """Whether the client's identity key signed the content; False where the key is not known."""
    try:
        peers[client_id].verify(signature, content)
    except (KeyError, InvalidSignature):
        return False
    return True


def _bytes(value: Any, size: int) -> bytes:
    try:
        content = b64decode(text(value, 2 * size + 4), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    if len(content) != size or written(content) != value:
        raise ValueError(f"a value is not {size} bytes in base 64")
    return content
