"""Mailbox server: a second channel for vehicles that cannot reach the API.

A vehicle writes a message into ``inbox/``. While the channel is enabled, a valid message is processed and moved to
``delivered/``. An invalid one is removed, and the reason is written to ``rejected/``. An update is treated as if it had
been uploaded; its weights are not stored here. Updates that an earlier version of the program moved to ``waiting/`` are
processed, too.

Write access to the mailbox allows one to fill it and to remove files, and nothing else: a message is valid only with
the HMAC of its client's key, under its own name, once, and for a day. What the server keeps of each client is bounded:
the messages of a day, twice as many as there are heartbeats in it, and the latest :data:`REASONS` reasons.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import Any

from fedvit.clock import SYSTEM_CLOCK
from fedvit.config import Settings
from fedvit.errors import (
    FedvitError,
    IntegrityError,
    MailboxError,
    NotFoundError,
    StateError,
    StateUnavailableError,
)
from fedvit.ports import ClockPort
from fedvit.privacy.randomness import derive_secret, load_or_create_root_secret
from fedvit.rounds.remote import RemoteWork
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
from fedvit.wire.untrusted import errors_as_rejection, one_line

DELIVERED, REJECTED, WAITING = "delivered", "rejected", "waiting"
# An older message is refused; until then its id is remembered, so that it counts once.
WINDOW = timedelta(days=1)
# How far a vehicle's clock may be ahead.
AHEAD = timedelta(minutes=5)
PER_CLIENT, PER_PASS = 20, 2_000
REASONS = 100
_SPARE_MESSAGES = 1_000
_MAX_ERRORS = 10
# No client is called so.
_UNREGISTERED = "_unregistered"
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
    """The results of one pass over the inbox.

    ``steps`` change the folder. ``taken`` are the names of the messages of a day, by client; ``rejecting`` are the
    folders of clients with a new reason.
    """

    last_seen: dict[str, datetime] = field(default_factory=dict)
    steps: list[Callable[[], None]] = field(default_factory=list)
    taken: dict[str, set[str]] = field(default_factory=dict)
    rejecting: set[str] = field(default_factory=set)
    delivered: int = 0
    rejected: int = 0


class Mailbox:
    """The mailbox of a state folder. Only one process at a time may call :meth:`take`.

    ``url`` is sent to vehicles.
    """

    def __init__(self, settings: Settings, store: Store, clock: ClockPort = SYSTEM_CLOCK) -> None:
        self.url = settings.fleet.mailbox_url or str((settings.home / "mailbox").resolve())
        self._store, self._clock = store, clock
        self._home = settings.home
        self._work = RemoteWork(settings, store)
        self._max_messages = int(2 * WINDOW.total_seconds() / settings.fleet.heartbeat_interval_s) + _SPARE_MESSAGES

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
            for client, name in self._arrived(place, batch):
                self._process(place, client, name, batch)
        # The store first: a message that was moved and not stored would be lost; storing it twice does no harm.
        self._store.clients.set_last_seen(batch.last_seen)
        errors = self._perform(batch.steps)
        if batch.delivered or batch.rejected:
            with self._changing_facts() as facts:
                facts["delivered"] += batch.delivered
                facts["rejected"] += batch.rejected
        for client in batch.last_seen:
            self._forget_old(client)
        for sender in batch.rejecting:
            for name in self._folder.files(f"{REJECTED}/{sender}")[:-REASONS]:
                self._folder.remove(f"{REJECTED}/{sender}/{name}")
        if errors:
            raise errors[0]
        return batch.delivered

    def _perform(self, steps: list[Callable[[], None]]) -> list[OSError]:
        """Change the folder; the errors. A path that somebody made unusable does not keep other messages back."""
        errors: list[OSError] = []
        for step in steps:
            try:
                step()
            except OSError as error:
                errors.append(error)
                if len(errors) == _MAX_ERRORS:
                    break
        return errors

    def _arrived(self, place: str, batch: _Batch) -> Iterator[tuple[str, str]]:
        """The client and the name of the messages that one pass takes; what belongs to no message is removed."""
        left = PER_PASS
        for client in self._folder.folders(place):
            files = self._folder.files(f"{place}/{client}")
            names = [name for name in files if name.endswith(".json")]
            for name in names[: min(PER_CLIENT, left)]:
                left -= 1
                yield client, name.removesuffix(".json")
            strays = [name for name in files if place == INBOX and self._is_stray(name)]
            batch.steps += [partial(self._folder.remove, f"{place}/{client}/{name}") for name in strays[:PER_CLIENT]]

    def _is_stray(self, name: str) -> bool:
        """Whether a file is neither a message nor an update whose message may still come."""
        stem, _, ending = name.rpartition(".")
        fresh = is_message_id(stem) and sent_at(stem) >= self._clock.now() - WINDOW
        return ending != "json" and not (ending == "safetensors" and fresh)

    def _process(self, place: str, client: str, name: str, batch: _Batch) -> None:
        """Process a message, with the update beside it, and record the result."""
        path = f"{place}/{client}/{name}"
        try:
            with errors_as_rejection(f"The message {name!r:.40}"):
                message = self._verified(place, client, name, batch)
                if place == INBOX:
                    # Names sort by time, so the last one is the newest.
                    batch.last_seen[client] = min(message.sent_at, self._clock.now())
                if place == WAITING or message.kind is MessageKind.UPDATE:
                    batch.steps.append(partial(self._folder.remove, f"{path}.safetensors"))
                    self._receive(f"{path}.safetensors", message)
        except StateUnavailableError:
            raise
        except FedvitError as error:
            self._reject(path, client, name, error, batch)
        else:
            batch.delivered += 1
            batch.steps.append(partial(self._folder.move, f"{path}.json", f"{DELIVERED}/{client}/{name}.json"))

    def _reject(self, path: str, client: str, name: str, error: FedvitError, batch: _Batch) -> None:
        """Keep the reason, and nothing of the message."""
        sender = _UNREGISTERED
        if _is_client_id(client):
            with suppress(NotFoundError):
                sender = self._store.clients.get(client).client_id
        reason = f"{REJECTED}/{sender}/{_safe(name, is_message_id)}.reason"
        batch.rejected += 1
        batch.rejecting.add(sender)
        batch.steps.append(partial(self._folder.write, reason, f"{one_line(str(error))}\n".encode()))
        batch.steps += [partial(self._folder.remove, f"{path}.{ending}") for ending in ("json", "safetensors")]

    def _receive(self, path: str, message: Message) -> None:
        """Receive the update beside a message.

        Raises:
            FedvitError: no round waits for it, there is none, it is another one than the message was signed for, or it
                is not valid.
        """
        note = UpdateNote.of(message)
        of = (message.client_id, note.run_id, note.round_index)
        content = self._folder.read(path, self._work.check_awaited(*of))
        if hashlib.sha256(content).hexdigest() != note.sha256:
            raise IntegrityError("The update is not the one that the message was signed for.")
        self._work.receive(*of, content).check()

    def _verified(self, place: str, client: str, name: str, batch: _Batch) -> Message:
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
        if place == INBOX:
            self._take_once(client, f"{name}.json", batch)
        return message

    def _take_once(self, client: str, name: str, batch: _Batch) -> None:
        if client not in batch.taken:
            listed = (self._folder.files(f"{folder}/{client}") for folder in (DELIVERED, WAITING))
            batch.taken[client] = {name for names in listed for name in names}
        taken = batch.taken[client]
        if name in taken:
            raise StateError("The message was taken before.")
        if len(taken) >= self._max_messages:
            raise StateError(f"The client has sent {len(taken)} messages in a day, as many as are taken.")
        taken.add(name)

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
