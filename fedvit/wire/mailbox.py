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
from fedvit.types import DIGEST, MAX_ROUND, RUN_ID
from fedvit.wire.untrusted import fields_of, integer, parse_json, text

MAX_MESSAGE_BYTES = 4_096
INBOX = "inbox"
_FORMAT = 1
_ID = re.compile(r"[0-9]{13}-[0-9a-f]{16}")
# Domain separation: no other use of the key gives the HMAC of a message.
_PURPOSE = b"fedvit mailbox message\0"
_FIELDS = {"format", "client_id", "message_id", "kind", "body"}
_MAX_NAME, _MAX_FORMAT = 64, 1_000


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
        """The note in a message; raises DataError where there is none."""
        try:
            body = fields_of(message.body, {"run_id", "round_index", "sha256"})
            run_id, sha256 = text(body["run_id"], _MAX_NAME), text(body["sha256"], _MAX_NAME)
            if not re.fullmatch(RUN_ID, run_id) or not re.fullmatch(DIGEST, sha256):
                raise ValueError("its run_id is no name of a run, or its sha256 no digest")
            return cls(run_id, integer(body["round_index"], 1, MAX_ROUND), sha256)
        except ValueError as error:
            raise DataError(f"The message does not say which round its update is for: {error}.") from None


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
        envelope = fields_of(parse_json(content, max_bytes=MAX_MESSAGE_BYTES), {"payload", "hmac"})
        payload, code = (text(envelope[name], MAX_MESSAGE_BYTES) for name in ("payload", "hmac"))
    except ValueError as error:
        raise DataError(f"The file is no message: {error}.") from None
    if not hmac.compare_digest(_hmac(payload, key).encode(), code.encode()):
        raise IntegrityError("The message was not signed with the key of the client in whose folder it is.")
    try:
        signed = fields_of(parse_json(payload.encode(), max_bytes=MAX_MESSAGE_BYTES), _FIELDS)
        names = text(signed["client_id"], _MAX_NAME), text(signed["message_id"], _MAX_NAME)
        version, kind = integer(signed["format"], 0, _MAX_FORMAT), text(signed["kind"], _MAX_NAME)
        if not isinstance(signed["body"], dict):
            raise ValueError("its body is no object")
    except ValueError as error:
        raise DataError(f"The message lacks a field, or one has another type: {error}.") from None
    if names != (client_id, message_id):
        raise IntegrityError("The message was signed under another name.")
    if version != _FORMAT or kind not in list(MessageKind):
        raise DataError(f"Format {version}, kind {kind!r} is unknown.")
    return Message(client_id, message_id, MessageKind(kind), signed["body"])


def _hmac(payload: str, key: bytes) -> str:
    return hmac.digest(key, _PURPOSE + payload.encode(), "sha256").hex()
