"""Mailbox server: a second channel for vehicles that cannot reach the API.

A vehicle writes a message into ``inbox/``. While the channel is enabled, a valid message is processed and moved to
``delivered/``, and an invalid one to ``rejected/``, with a file beside it that gives the reason. An update is treated
as if it had been uploaded; its weights are not stored here. Updates that an earlier version of the program moved to
``waiting/`` are processed, too.

Write access to the mailbox allows one to fill it and to remove files, and nothing else: a message is valid only with
the HMAC of its client's key, under its own name, once, and for a day.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from fedvit.api.clients import ReceiptStatus
from fedvit.clock import SYSTEM_CLOCK
from fedvit.config import Settings
from fedvit.errors import DataError, FedvitError, IntegrityError, MailboxError, NotFoundError, StateError
from fedvit.ports import ClockPort
from fedvit.privacy.randomness import derive_secret, load_or_create_root_secret
from fedvit.rounds.remote import Receipt, RemoteWork
from fedvit.store.store import Store
from fedvit.types import CLIENT_ID
from fedvit.wire.folders import Folder, open_folder
from fedvit.wire.mailbox import (
    INBOX,
    MAX_MESSAGE_BYTES,
    Message,
    MessageKind,
    UpdateNote,
    is_message_id,
    sent_at,
    verify_message,
)

DELIVERED, REJECTED, WAITING = "delivered", "rejected", "waiting"
# An older message is refused; until then its id is remembered, so that it counts once.
WINDOW = timedelta(days=1)
# How far a vehicle's clock may be ahead.
AHEAD = timedelta(minutes=5)
PER_CLIENT, PER_PASS = 20, 2_000
_KEY = "mailbox"


@dataclass(frozen=True, slots=True)
class MailboxState:
    """The state of the channel. ``pending`` includes ``not_yet_taken``, the updates in ``waiting/``."""

    enabled: bool
    url: str
    enabled_at: datetime | None
    pending: int
    not_yet_taken: int
    delivered: int
    rejected: int


@dataclass(slots=True)
class _Batch:
    """The results of one pass over the inbox."""

    last_seen: dict[str, datetime] = field(default_factory=dict)
    moves: list[tuple[str, str]] = field(default_factory=list)
    removals: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    delivered: int = 0


class Mailbox:
    """The mailbox of a state folder. Only one process at a time may call :meth:`take`.

    ``url`` is sent to vehicles.
    """

    def __init__(self, settings: Settings, store: Store, clock: ClockPort = SYSTEM_CLOCK) -> None:
        self.url = settings.fleet.mailbox_url or str((settings.home / "mailbox").resolve())
        self._store, self._clock = store, clock
        self._home = settings.home
        self._work = RemoteWork(settings, store)
        self._max_update_bytes = settings.training.validation.max_update_bytes

    def key_of(self, client_id: str) -> bytes:
        """The key with which this client signs its messages."""
        return derive_secret(self._root_key, client_id)

    @cached_property
    def _root_key(self) -> bytes:
        # An intermediate key: the clients' training keys are derived from the root key under the same client ids.
        return derive_secret(load_or_create_root_secret(self._home), "mailbox")

    def enabled(self) -> bool:
        """Whether messages are processed."""
        return self.enabled_and_delivered()[0]

    def enabled_and_delivered(self) -> tuple[bool, int]:
        """Whether messages are processed, and how many were; does not access the mailbox itself."""
        facts = self._facts()
        return facts["enabled"], facts["delivered"]

    def enable(self) -> MailboxState:
        """Begin to process messages; harmless when repeated.

        Raises:
            MailboxError: the mailbox cannot be written to.
            ConfigError: ``fleet.mailbox_url`` needs a package that is missing.
        """
        try:
            for name in (INBOX, DELIVERED, REJECTED, WAITING):
                self._folder.write(f"{name}/.about", b"fedvit mailbox\n")
        except OSError as error:
            raise _unreachable(self.url, error) from error
        with self._changing_facts() as facts:
            if not facts["enabled"]:
                facts |= {"enabled": True, "enabled_at": self._clock.now().isoformat()}
        return self.state()

    def disable(self) -> MailboxState:
        """Process no more messages; those in the mailbox stay there. Harmless when repeated."""
        with self._changing_facts() as facts:
            facts |= {"enabled": False, "enabled_at": None}
        return self.state()

    def state(self) -> MailboxState:
        """The state of the channel.

        Raises:
            MailboxError: the mailbox cannot be read.
            ConfigError: ``fleet.mailbox_url`` needs a package that is missing.
        """
        facts = self._facts()
        try:
            inbox, waiting = self._count(INBOX), self._count(WAITING)
        except OSError as error:
            raise _unreachable(self.url, error) from error
        since = facts["enabled_at"]
        return MailboxState(
            enabled=facts["enabled"],
            url=self.url,
            enabled_at=datetime.fromisoformat(since) if since else None,
            pending=inbox + waiting,
            not_yet_taken=waiting,
            delivered=facts["delivered"],
            rejected=facts["rejected"],
        )

    def take(self) -> int:
        """Process the inbox if the channel is enabled; return how many messages were delivered.

        One call processes a bounded number of messages of each client, so that no client delays the others.

        Raises:
            MailboxError: the mailbox cannot be used.
        """
        if not self.enabled():
            return 0
        try:
            return self._take()
        except OSError as error:
            raise _unreachable(self.url, error) from error

    @cached_property
    def _folder(self) -> Folder:
        return open_folder(self.url)

    def _take(self) -> int:
        batch = _Batch()
        for place in (WAITING, INBOX):
            for client, name in self._arrived(place):
                self._process(place, client, name, batch)
        # The store first: a message that was moved and not stored would be lost; storing it twice does no harm.
        self._store.clients.set_last_seen(batch.last_seen)
        for path, target in batch.moves:
            if target in batch.reasons:
                self._folder.write(f"{target}.reason", batch.reasons[target].encode())
            self._folder.move(path, target)
        for path in batch.removals:
            self._folder.remove(path)
        if batch.moves:
            with self._changing_facts() as facts:
                facts["delivered"] += batch.delivered
                facts["rejected"] += len(batch.reasons)
        for client in batch.last_seen:
            self._forget_old(client)
        return batch.delivered

    def _arrived(self, place: str) -> Iterator[tuple[str, str]]:
        left = PER_PASS
        for client in self._folder.folders(place):
            names = [name for name in self._folder.files(f"{place}/{client}") if name.endswith(".json")]
            for name in names[: min(PER_CLIENT, left)]:
                left -= 1
                yield client, name.removesuffix(".json")

    def _process(self, place: str, client: str, name: str, batch: _Batch) -> None:
        """Process a message, with the update beside it, and record the result."""
        path = f"{place}/{client}/{name}"
        try:
            message = self._verified(place, client, name)
            if place == INBOX:
                # Names sort by time, so the last one is the newest.
                batch.last_seen[client] = min(message.sent_at, self._clock.now())
            if place == WAITING or message.kind is MessageKind.UPDATE:
                batch.removals.append(f"{path}.safetensors")
                receipt = self._received(f"{path}.safetensors", message)
                if receipt.status not in (ReceiptStatus.RECEIVED, ReceiptStatus.ACCEPTED):
                    raise DataError(f"The update is {receipt.status.value}: {receipt.reason}.")
        except FedvitError as error:
            target = f"{REJECTED}/{_safe(client, _is_client_id)}/{_safe(name, is_message_id)}.json"
            batch.reasons[target] = f"{error}\n"
        else:
            target = f"{DELIVERED}/{client}/{name}.json"
            batch.delivered += 1
        batch.moves.append((f"{path}.json", target))

    def _received(self, path: str, message: Message) -> Receipt:
        """The receipt for the update beside a message.

        Raises:
            FedvitError: there is no update, or another one than the message was signed for.
        """
        try:
            note = UpdateNote.of(message)
        except (KeyError, TypeError, ValueError):
            raise DataError("The message does not say which round its update is for.") from None
        content = self._folder.read(path, self._max_update_bytes)
        if hashlib.sha256(content).hexdigest() != note.sha256:
            raise IntegrityError("The update is not the one that the message was signed for.")
        return self._work.receive(message.client_id, note.run_id, note.round_index, content)

    def _verified(self, place: str, client: str, name: str) -> Message:
        """The valid message in a file. Its sender and age were checked before it was moved to ``waiting/``.

        Raises:
            FedvitError: it is not valid; the error gives the reason.
        """
        if place == INBOX:
            if not _is_client_id(client) or not is_message_id(name):
                raise NotFoundError("No client, or no message, is called so.")
            self._store.clients.get(client)
            now, at = self._clock.now(), sent_at(name)
            if not now - WINDOW <= at <= now + AHEAD:
                raise StateError(f"The message was sent at {at.isoformat()} and arrived at {now.isoformat()}.")
        content = self._folder.read(f"{place}/{client}/{name}.json", MAX_MESSAGE_BYTES)
        message = verify_message(content, self.key_of(client), client, name)
        before = (DELIVERED, WAITING) if place == INBOX else ()
        if any(f"{name}.json" in self._folder.files(f"{folder}/{client}") for folder in before):
            raise StateError("The message was taken before.")
        return message

    def _forget_old(self, client: str) -> None:
        for name in self._folder.files(f"{DELIVERED}/{client}"):
            name = name.removesuffix(".json")
            if is_message_id(name) and sent_at(name) < self._clock.now() - WINDOW:
                self._folder.remove(f"{DELIVERED}/{client}/{name}.json")

    def _count(self, place: str) -> int:
        clients = self._folder.folders(place)
        return sum(name.endswith(".json") for client in clients for name in self._folder.files(f"{place}/{client}"))

    @contextmanager
    def _changing_facts(self) -> Iterator[dict[str, Any]]:
        with self._store.transaction() as transaction:
            facts = _with_defaults(transaction.metadata.get(_KEY))
            yield facts
            transaction.metadata.set(_KEY, facts)

    def _facts(self) -> dict[str, Any]:
        return _with_defaults(self._store.metadata.get(_KEY))


def _with_defaults(stored: Any) -> dict[str, Any]:
    return {"enabled": False, "enabled_at": None, "delivered": 0, "rejected": 0} | (stored or {})


def _is_client_id(text: str) -> bool:
    return re.fullmatch(CLIENT_ID, text) is not None


def _safe(name: str, good: Callable[[str], bool]) -> str:
    """The name, or its hash where it is not safe as the name of a file."""
    return name if good(name) else hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]


def _unreachable(url: str, error: OSError) -> MailboxError:
    return MailboxError(f"The mailbox {url} cannot be used: {error}.", cure="Mend it, or set fleet.mailbox_url.")
