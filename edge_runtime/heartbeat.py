"""Heartbeats of a vehicle: to the control server, or through the mailbox when that does not answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import quote

import httpx

from edge_runtime.mailbox import MailboxSender
from fedvit.api.transport import exchange, json_of
from fedvit.errors import IntegrityError

_LOG = logging.getLogger(__name__)
FIRST_INTERVAL_S = 30.0
JOIN_S = 2.0
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024


class HeartbeatChannel(StrEnum):
    """The channel through which a heartbeat was sent."""

    API = "api"
    MAILBOX = "mailbox"
    NONE = "none"


class HeartbeatLoop:
    """Sends heartbeats of a registered client in the interval that the server sets.

    ``describe`` returns the body of a heartbeat; see ``POST /api/clients/{client_id}/heartbeat``.
    """

    def __init__(
        self, http: httpx.Client, client_id: str, describe: Callable[[], Mapping[str, Any]], mailbox: MailboxSender
    ) -> None:
        self._http, self._describe, self._mailbox = http, describe, mailbox
        self._path = f"/api/clients/{quote(client_id, safe='')}/heartbeat"
        self.interval_s = FIRST_INTERVAL_S
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread, which sends the first heartbeat at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; a request that hangs on the network ends with the process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def beat(self) -> HeartbeatChannel:
        """Send one heartbeat. Only without a response, or after a 5xx, the mailbox is used; a refusal is a response."""
        body = dict(self._describe())
        try:
            request = self._http.build_request("POST", self._path, json=body)
            answer = exchange(self._http, request, max_bytes=MAX_ANSWER_BYTES, deadline_s=TIMEOUT_S)
            if answer.status_code < 500:
                self._adopt_interval(answer)
                return HeartbeatChannel.API
            _LOG.warning("%s answered %d", answer.url, answer.status_code)
        except (httpx.HTTPError, IntegrityError) as error:
            _LOG.warning("%s does not answer: %s", self._http.base_url, error)
        return HeartbeatChannel.MAILBOX if self._mailbox.heartbeat(body) else HeartbeatChannel.NONE

    def _adopt_interval(self, answer: httpx.Response) -> None:
        if answer.status_code != httpx.codes.OK:
            _LOG.warning("%s refused a heartbeat: %d", answer.url, answer.status_code)
            return
        try:
            interval_s = float(json_of(answer)["interval_s"])
        except (ValueError, KeyError, TypeError):
            return
        if 1 <= interval_s <= 3600:
            self.interval_s = interval_s

    def _run(self) -> None:
        while True:
            try:
                self.beat()
            except Exception:  # Heartbeats go on after any fault.
                _LOG.exception("a heartbeat failed")
            if self._stop.wait(self.interval_s):
                return
