"""Mailbox client of the vehicle: a second channel for messages when the server's API cannot be reached."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import UsageError
from fedvit.ports import ClockPort
from fedvit.wire.folders import Folder
from fedvit.wire.mailbox import Message, MessageKind, new_message_id, sign_message

_LOG = logging.getLogger(__name__)
KEY_BYTES = 32


class MailboxSender:
    """Signs messages of a registered client with its mailbox key, and writes them into the mailbox ``folder``.

    What cannot be written is not kept.
    """

    def __init__(self, folder: Folder, client_id: str, key: bytes, clock: ClockPort = SYSTEM_CLOCK) -> None:
        self._folder, self._client_id, self._key, self._clock = folder, client_id, key, clock
        self._last_path: str | None = None

    def heartbeat(self, body: Mapping[str, Any]) -> bool:
        """Write a heartbeat, which replaces all earlier ones; return whether it is in the mailbox."""
        message = self._message(MessageKind.HEARTBEAT, body)
        # The earlier heartbeat, if the server has not taken it, says nothing that the new one does not.
        if not self._write({message.path: sign_message(message, self._key)}, remove=self._last_path):
            return False
        self._last_path = message.path
        return True

    def update(self, run_id: str, round_index: int, content: bytes) -> bool:
        """Write an update; return whether it is in the mailbox. Otherwise the caller has to try again."""
        digest = hashlib.sha256(content).hexdigest()
        message = self._message(MessageKind.UPDATE, {"run_id": run_id, "round_index": round_index, "sha256": digest})
        weights_path = message.path.removesuffix(".json") + ".safetensors"
        return self._write({weights_path: content, message.path: sign_message(message, self._key)})

    def _message(self, kind: MessageKind, body: Mapping[str, Any]) -> Message:
        return Message(self._client_id, new_message_id(self._clock.now()), kind, dict(body))

    def _write(self, files: Mapping[str, bytes], remove: str | None = None) -> bool:
        try:
            for path, content in files.items():
                self._folder.write(path, content)
            if remove is not None:
                self._folder.remove(remove)
        except OSError as error:
            _LOG.warning("the mailbox cannot be reached: %s", error)
            return False
        return True


def read_mailbox_key(path: Path) -> bytes:
    """The mailbox key in a file, which holds it in hex; raises UsageError where it holds no such key."""
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise UsageError(f"The mailbox key file {path} cannot be read: {error}.") from None
    if len(key) != KEY_BYTES:
        raise UsageError(
            f"The key in {path} has {len(key)} bytes instead of {KEY_BYTES}.",
            cure="Put the key there that `fedvit token create --client ... --json` printed.",
        )
    return key
