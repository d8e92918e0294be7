"""Messages that vehicles leave where the server finds them later: one small JSON file each, under a key of their own.

A file ``<mailbox>/inbox/<client_id>/<message_id>.json`` holds ``{"payload": TEXT, "hmac": HEX}``. TEXT is the JSON
of the message; the HMAC-SHA256 under the client's mailbox key covers its very bytes, so nothing has to be written
canonically. A message id begins with the moment of sending in milliseconds: ids sort by time, and how old a message is
can be told from its name. A message of kind ``update`` has its weights beside it, ``<message_id>.safetensors``, which
are put there before it; its body is an :class:`UpdateNote`.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from fedvit.errors import DataError, IntegrityError

MAX_MESSAGE_BYTES = 16_384
INBOX = "inbox"
_FORMAT = 1
_ID = re.compile(r"[0-9]{13}-[0-9a-f]{16}")
# So that no other use of the key can ever yield the HMAC of a message.
_PURPOSE = b"fedvit mailbox message\0"


_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class MessageKind(StrEnum):
    """What a message is about."""

    HEARTBEAT = "heartbeat"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``body`` holds JSON types only."""

    client_id: str
    message_id: str
    kind: MessageKind
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sent_at(self) -> datetime:
        """When it was sent, to the millisecond, by the vehicle's clock."""
        return sent_at(self.message_id)

    @property
    def path(self) -> str:
        """Where it lies in a mailbox until it is taken."""
        return f"{INBOX}/{self.client_id}/{self.message_id}.json"


@dataclass(frozen=True, slots=True)
class UpdateNote:
    """Which round the update beside a message answers; ``sha256``, hex, is that of its bytes."""

    run_id: str
    round_index: int
    sha256: str

    @classmethod
    def of(cls, message: Message) -> UpdateNote:
        """The note in a message.

        Raises:
            KeyError, TypeError, ValueError: there is none.
        """
        body = message.body
        note = cls(body["run_id"], body["round_index"], body["sha256"])
        if not isinstance(note.run_id, str) or type(note.round_index) is not int or not isinstance(note.sha256, str):
            raise TypeError("a field of the note is of another type")
        return note


def new_message_id(at: datetime) -> str:
    """An id for a message that is sent now."""
    return f"{int(at.timestamp() * 1000):013d}-{secrets.token_hex(8)}"


def is_message_id(text: str) -> bool:
    """Whether a message could be called so."""
    return _ID.fullmatch(text) is not None


def sent_at(message_id: str) -> datetime:
    """When the message was sent that is called so."""
    return datetime.fromtimestamp(int(message_id[:13]) / 1000, UTC)


def seal(message: Message, key: bytes) -> bytes:
    """The message as it is put into a mailbox."""
    payload = json.dumps(
        {
            "format": _FORMAT,
            "client_id": message.client_id,
            "message_id": message.message_id,
            "kind": message.kind,
            "body": dict(message.body),
        }
    )
    return json.dumps({"payload": payload, "hmac": _hmac(payload, key)}).encode()


def unseal(content: bytes, key: bytes, client_id: str, message_id: str) -> Message:
    """The message in a file, whose name says who sent it and what it is called.

    Raises:
        IntegrityError: it was not sealed with this key, or was sealed under another name.
        DataError: it is no message, or one of a kind or format that nobody here knows.
    """
    try:
        envelope = json.loads(content)
        payload, code = envelope["payload"], envelope["hmac"]
        good = hmac.compare_digest(_hmac(payload, key).encode(), code.encode())
    except _MALFORMED:
        raise DataError("The file is no message.") from None
    if not good:
        raise IntegrityError("The message was not sealed with the key of the client that it is to come from.")
    try:
        return _checked(json.loads(payload), client_id, message_id)
    except _MALFORMED:
        raise DataError("The message has not the fields of one.") from None


def _checked(signed: Mapping[str, Any], client_id: str, message_id: str) -> Message:
    if (signed["client_id"], signed["message_id"]) != (client_id, message_id):
        raise IntegrityError("The message was sealed under another name.")
    if signed["format"] != _FORMAT or signed["kind"] not in list(MessageKind):
        raise DataError(f"Format {signed['format']!r}, kind {signed['kind']!r} is not known here.")
    return Message(client_id, message_id, MessageKind(signed["kind"]), dict(signed["body"]))


def _hmac(payload: str, key: bytes) -> str:
    return hmac.digest(key, _PURPOSE + payload.encode(), "sha256").hex()
