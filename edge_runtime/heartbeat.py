"""A vehicle shows that it is there: to the control server, or, when that does not answer, through the mailbox."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import quote

import httpx

from edge_runtime.mailbox import MailboxSender

_LOG = logging.getLogger(__name__)
FIRST_INTERVAL_S = 30.0
JOIN_S = 2.0


class Way(StrEnum):
    """How a heartbeat went out."""

    API = "api"
    MAILBOX = "mailbox"
    NONE = "none"


class HeartbeatLoop:
    """Beats as often as the server asks for.

    Args:
        http: speaks to the control server.
        source: its URL.
        client_id: as whom the vehicle is registered.
        describe: what a beat says; see ``POST /api/clients/{client_id}/heartbeat``.
        mailbox: the second way.
    """

    def __init__(
        self,
        http: httpx.Client,
        source: str,
        client_id: str,
        describe: Callable[[], Mapping[str, Any]],
        mailbox: MailboxSender,
    ) -> None:
        self._http, self._describe, self._mailbox = http, describe, mailbox
        self._url = f"{source.rstrip('/')}/api/clients/{quote(client_id, safe='')}/heartbeat"
        self._interval_s = FIRST_INTERVAL_S
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a beat that hangs on the network ends with the process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def beat(self) -> Way:
        """Beat once. An answer is an answer, also one that refuses; only silence and a broken server are none."""
        body = dict(self._describe())
        try:
            answer = self._http.post(self._url, json=body)
            if answer.status_code < 500:
                self._heed(answer)
                return Way.API
            _LOG.warning("%s answered %d", self._url, answer.status_code)
        except httpx.HTTPError as error:
            _LOG.warning("%s does not answer: %s", self._url, error)
        return Way.MAILBOX if self._mailbox.heartbeat(body) else Way.NONE

    def _heed(self, answer: httpx.Response) -> None:
        if answer.status_code != httpx.codes.OK:
            _LOG.warning("%s refused a heartbeat: %d", self._url, answer.status_code)
            return
        try:
            interval_s = float(answer.json()["interval_s"])
        except (ValueError, KeyError, TypeError):
            return
        if 1 <= interval_s <= 3600:
            self._interval_s = interval_s

    def _run(self) -> None:
        while True:
            try:
                self.beat()
            except Exception:  # A vehicle beats on whatever happens.
                _LOG.exception("a heartbeat failed")
            if self._stop.wait(self._interval_s):
                return
