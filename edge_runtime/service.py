"""The model that serves now, and how the next one takes its place without a request noticing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from edge_runtime.engine import InferenceEngine
from fedvit.errors import FedvitError, NoModelError
from fedvit.registry.client import LoadedRelease, ReleaseClient
from fedvit.types import utc_now
from fedvit.wire.manifest import ReleaseManifest

_LOG = logging.getLogger(__name__)
STOP_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """How the service fares, for a health answer."""

    last_poll_at: datetime | None
    last_error: str | None


class ModelService:
    """Holds the current engine. Reading is lock-free; only :meth:`refresh` swaps, and only to an engine that works.

    Args:
        client: where verified releases come from.
        threads: how many threads work on one image.
        on_swap: told the release that is about to serve.
    """

    def __init__(
        self, client: ReleaseClient, threads: int = 1, on_swap: Callable[[ReleaseManifest], None] | None = None
    ) -> None:
        self._client = client
        self._threads = threads
        self._on_swap = on_swap
        self._engine: InferenceEngine | None = None
        self._refreshing = threading.Lock()
        self._last_poll_at: datetime | None = None
        self._feed_error: str | None = None
        self._load_error: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def engine(self) -> InferenceEngine:
        """The engine that serves now; a caller keeps its own reference while it infers.

        Raises:
            NoModelError: no release was loaded yet.
        """
        engine = self._engine
        if engine is None:
            reason = self._load_error or self._feed_error or "The source has no release yet."
            raise NoModelError(f"There is no model to serve yet. {reason}", cure="Ask again later.")
        return engine

    @property
    def current(self) -> InferenceEngine | None:
        """The engine that serves now, or None."""
        return self._engine

    def report(self) -> ServiceReport:
        """When the source was last asked, and what went wrong since the last success."""
        return ServiceReport(self._last_poll_at, self._load_error or self._feed_error)

    def load_cached(self) -> bool:
        """Serve the newest kept release that works, without asking the source; False when there is none."""
        with self._refreshing:
            for release in self._client.cached():
                if self._swap(release):
                    self._client.adopt(release)
                    return True
        return False

    def refresh(self) -> bool:
        """Ask the source once; True if another model serves now. Never raises on a bad answer: the old one stays."""
        with self._refreshing:
            try:
                release = self._client.poll()
            except FedvitError as error:
                self._note(str(error))
                return False
            finally:
                self._last_poll_at = utc_now()
            self._feed_error = None
            return release is not None and self._swap(release)

    def start(self, poll_interval_s: float) -> None:
        """Serve from the cache, then poll in the background until :meth:`stop`."""
        self.load_cached()
        self._thread = threading.Thread(target=self._poll, args=(poll_interval_s,), name="release-poll", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End polling. A poll that hangs on the network ends with the process and is not waited for."""
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
            except Exception as error:  # A vehicle polls on whatever happens; the error is shown in its health.
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
            self._load_error = str(error)
            return False
        if self._on_swap is not None:
            self._on_swap(engine.manifest)
        self._engine = engine
        self._load_error = None
        _LOG.info("serving %s (%s)", engine.manifest.version, engine.manifest.variant)
        return True
