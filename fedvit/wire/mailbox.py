"""Mailbox messages: small JSON files that vehicles sign with an HMAC and the server collects.

A file ``<mailbox>/inbox/<client_id>/<message_id>.json`` holds ``{"payload": TEXT, "hmac": HEX}``. TEXT is the JSON of
the message; the HMAC-SHA256 under the client's mailbox key covers its bytes as they are, so that no canonical form is
needed. A message id begins with the time of sending in milliseconds: ids sort by time, and a message's age can be read
from its name. A message of kind ``update`` has an :class:`UpdateNote` as its body, and its weights beside it in
``<message_id>.safetensors``, which is written first.
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
# Domain separation: no other use of the key gives the HMAC of a message.
_PURPOSE = b"fedvit mailbox message\0"
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class MessageKind(StrEnum):
    """The kind of a message."""

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
        """The time of sending, to the millisecond, by the vehicle's clock."""
        return sent_at(self.message_id)

    @property
    def path(self) -> str:
        """Its path in the mailbox until the server takes it."""
        return f"{INBOX}/{self.client_id}/{self.message_id}.json"


@dataclass(frozen=True, slots=True)
class UpdateNote:
    """The round of the update beside a message, and the SHA-256 (hex) of the update's bytes."""

    run_id: str
    round_index: int
    sha256: str

    @classmethod
    def of(cls, message: Message) -> UpdateNote:
        """The note in a message; raises KeyError, TypeError or ValueError where there is none."""
        body = message.body
        note = cls(body["run_id"], body["round_index"], body["sha256"])
        if not isinstance(note.run_id, str) or type(note.round_index) is not int or not isinstance(note.sha256, str):
            raise TypeError("a field of the note is of another type")
        return note


def new_message_id(at: datetime) -> str:
    """A new id for a message that is sent at this time."""
    return f"{int(at.timestamp() * 1000):013d}-{secrets.token_hex(8)}"


def is_message_id(text: str) -> bool:
    """Whether the text has the form of a message id."""
    return _ID.fullmatch(text) is not None


def sent_at(message_id: str) -> datetime:
    """The time of sending in a message id."""
    return datetime.fromtimestamp(int(message_id[:13]) / 1000, UTC)


def sign_message(message: Message, key: bytes) -> bytes:
    """The content of a message's file, with an HMAC under ``key``."""
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


def verify_message(content: bytes, key: bytes, client_id: str, message_id: str) -> Message:
    """The message in a file; client and message id come from the file's path.

    Raises:
        IntegrityError: it was not signed with this key, or with another client or message id.
        DataError: it is no message, or its kind or format is unknown.
    """
    try:
        envelope = json.loads(content)
        payload, code = envelope["payload"], envelope["hmac"]
        good = hmac.compare_digest(_hmac(payload, key).encode(), code.encode())
    except _MALFORMED:
        raise DataError("The file is no message.") from None
    if not good:
        raise IntegrityError("The message was not signed with the key of the client in whose folder it is.")
    try:
        return _checked(json.loads(payload), client_id, message_id)
    except _MALFORMED:
        raise DataError("The message lacks a field, or one has another type.") from None


def _checked(signed: Mapping[str, Any], client_id: str, message_id: str) -> Message:
    if (signed["client_id"], signed["message_id"]) != (client_id, message_id):
        raise IntegrityError("The message was signed under another name.")
    if signed["format"] != _FORMAT or signed["kind"] not in list(MessageKind):
        raise DataError(f"Format {signed['format']!r}, kind {signed['kind']!r} is unknown.")
    return Message(client_id, message_id, MessageKind(signed["kind"]), dict(signed["body"]))


def _hmac(payload: str, key: bytes) -> str:
    return hmac.digest(key, _PURPOSE + payload.encode(), "sha256").hex()
