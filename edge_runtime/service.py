"""The model that an inference process serves, and its replacement by newer releases without an interruption."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime

from edge_runtime.engine import InferenceEngine
from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import FedvitError, NoModelError
from fedvit.ports import ClockPort
from fedvit.registry.backoff import Backoff
from fedvit.registry.client import LoadedRelease, ReleaseClient
from fedvit.wire.manifest import ReleaseManifest

_LOG = logging.getLogger(__name__)
STOP_TIMEOUT_S = 2.0


class ModelService:
    """Holds the current engine. Reading takes no lock; an engine is replaced only by one that works.

    Args:
        client: the source of verified releases.
        threads: the number of threads for one image.
        on_swap: called with each release just before it serves.

    Attributes:
        current: the engine that serves, or None.
        last_poll_at: the time of the last poll, or None.
    """

    def __init__(
        self,
        client: ReleaseClient,
        threads: int = 1,
        on_swap: Callable[[ReleaseManifest], None] = lambda _: None,
        clock: ClockPort = SYSTEM_CLOCK,
    ) -> None:
        self._client, self._threads, self._on_swap, self._clock = client, threads, on_swap, clock
        self.current: InferenceEngine | None = None
        self._refreshing = threading.Lock()
        self.last_poll_at: datetime | None = None
        self._feed_error: str | None = None
        self._load_error: str | None = None
        self._unloaded: LoadedRelease | None = None
        self._backoff = Backoff(clock)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def engine(self) -> InferenceEngine:
        """The current engine; a caller keeps its own reference during an inference.

        Raises:
            NoModelError: no release was loaded yet.
        """
        engine = self.current
        if engine is None:
            reason = self.last_error or "The source has no release yet."
            raise NoModelError(f"There is no model to serve yet. {reason}", cure="Ask again later.")
        return engine

    @property
    def last_error(self) -> str | None:
        """The error since the last success."""
        return self._load_error or self._feed_error

    def load_cached(self) -> bool:
        """Serve the newest cached release that works, without polling the source; False when there is none."""
        with self._refreshing:
            unloaded = None
            for release in self._client.cached():
                if self._swap(release):
                    self._client.adopt(release)
                    # A newer one that failed now may be loaded later.
                    self._unloaded = unloaded
                    return True
                unloaded = unloaded or release
        return False

    def refresh(self) -> bool:
        """Poll the source once; True if another model serves now. On an error the current model stays.

        A release that could not be loaded is tried again with exponential back-off, until the source has another one.
        """
        with self._refreshing:
            release = None
            try:
                release = self._client.poll()
                self._feed_error = None
            except FedvitError as error:
                self._note(str(error))
            finally:
                self.last_poll_at = self._clock.now()
            if release is not None:
                self._backoff.reset()
            elif not self._backoff.wait_s:
                release = self._unloaded
            return release is not None and self._swap(release)

    def start(self, poll_interval_s: float) -> None:
        """Serve from the cache, then poll in the background until :meth:`stop`."""
        self.load_cached()
        self._thread = threading.Thread(target=self._poll, args=(poll_interval_s,), name="release-poll", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop polling. A poll that hangs on the network ends with the process."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)
            if self._thread.is_alive():
                return
        self._client.close()

    def _poll(self, poll_interval_s: float) -> None:
        while True:
            try:
                self.refresh()
            except Exception as error:  # Polling goes on after any error; the health answer shows it.
                _LOG.exception("polling failed")
                self._note(f"{type(error).__name__}: {error}")
            if self._stop.wait(poll_interval_s):
                return

    def _note(self, error: str) -> None:
        if error != self._feed_error:
            _LOG.warning("%s", error)
        self._feed_error = error

    def _swap(self, release: LoadedRelease) -> bool:
        try:
            engine = InferenceEngine(release.model_path, release.manifest, self._threads)
        except FedvitError as error:
            _LOG.warning("%s", error)
            self._load_error, self._unloaded = str(error), release
            self._backoff.failed()
            return False
        self._on_swap(engine.manifest)
        self.current = engine
        self._load_error = self._unloaded = None
        self._backoff.reset()
        _LOG.info("serving %s (%s)", engine.manifest.version, engine.manifest.variant)
        return True
