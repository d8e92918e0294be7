"""The vehicle's side of the mailbox: leaves messages where the server finds them when its API cannot be reached."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedvit.errors import UsageError
from fedvit.types import utc_now
from fedvit.wire.folders import Folder
from fedvit.wire.mailbox import Message, MessageKind, new_message_id, seal

_LOG = logging.getLogger(__name__)
# A vehicle that reaches neither API nor mailbox for days must not fill its memory.
MAX_WAITING = 100
KEY_BYTES = 32


class MailboxSender:
    """Seals messages and puts them into the mailbox; what cannot be put there now is kept and tried again.

    Args:
        folder: the mailbox.
        client_id: as whom the vehicle is registered.
        key: its mailbox key, as the server told it.
    """

    def __init__(self, folder: Folder, client_id: str, key: bytes, now: Callable[[], datetime] = utc_now) -> None:
        self._folder, self._client_id, self._key, self._now = folder, client_id, key, now
        self._waiting: deque[Message] = deque(maxlen=MAX_WAITING)
        self._last_heartbeat: str | None = None

    def heartbeat(self, body: Mapping[str, Any]) -> bool:
        """Leave a heartbeat in the place of all earlier ones; return whether everything is in the mailbox."""
        for message in [old for old in self._waiting if old.kind is MessageKind.HEARTBEAT]:
            self._waiting.remove(message)
        self._waiting.append(Message(self._client_id, new_message_id(self._now()), MessageKind.HEARTBEAT, dict(body)))
        return self.flush()

    def update(self, run_id: str, round_index: int, content: bytes) -> bool:
        """Leave an update; return whether it is in the mailbox. It is not kept: whoever has it tries again."""
        digest = hashlib.sha256(content).hexdigest()
        body = {"run_id": run_id, "round_index": round_index, "sha256": digest}
        message = Message(self._client_id, new_message_id(self._now()), MessageKind.UPDATE, body)
        try:
            self._folder.write(message.path.removesuffix(".json") + ".safetensors", content)
            self._folder.write(message.path, seal(message, self._key))
        except OSError as error:
            _LOG.warning("the mailbox cannot be reached: %s", error)
            return False
        return True

    def flush(self) -> bool:
        """Try to leave what waits; return whether nothing waits any more."""
        try:
            while self._waiting:
                self._leave(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            _LOG.warning("the mailbox cannot be reached: %s", error)
        return not self._waiting

    def _leave(self, message: Message) -> None:
        self._folder.write(message.path, seal(message, self._key))
        if message.kind is MessageKind.HEARTBEAT:
            if self._last_heartbeat is not None:
                # Not taken yet, or gone already: either way the newer one says all.
                self._folder.remove(self._last_heartbeat)
            self._last_heartbeat = message.path


def read_mailbox_key(path: Path) -> bytes:
    """The mailbox key in a file, as hex.

    Raises:
        UsageError: there is none.
    """
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
