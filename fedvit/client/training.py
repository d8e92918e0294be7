"""Routes of training, aggregation, the model, long operations, the system as a whole, and the audit trail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fedvit.api.choices import AggregationMode, ClientSelection, OptimizeStrategy, RetrainStrategy, ShutdownMode
from fedvit.api.model import ModelInfo, ModelView, ReleaseView
from fedvit.api.system import AuditView, HealthView, OperationView
from fedvit.api.training import AggregationModeView, ProgressView, TrainingConfigView
from fedvit.client.caller import PAGE, Group, given, pages, segment
from fedvit.errors import StillRunningError
from fedvit.types import OperationStatus, Variant

FIRST_PAUSE_S, LONGEST_PAUSE_S, BACK_OFF = 0.25, 5.0, 1.5


class Training(Group):
    """The training loop."""

    def status(self) -> ProgressView:
        """Where it stands."""
        return self._read(ProgressView, "/api/training/status")

    def start(self, *, idempotency_key: str | None = None) -> ProgressView:
        """Begin or continue the run that the settings describe; harmless when it is under way."""
        return self._post(ProgressView, "/api/training/start", key=idempotency_key)

    def stop(self, *, idempotency_key: str | None = None) -> ProgressView:
        """End the loop after the round under way; a start continues it."""
        return self._post(ProgressView, "/api/training/stop", key=idempotency_key)

    def restart(
        self, client_selection: ClientSelection | None = None, *, idempotency_key: str | None = None
    ) -> OperationView:
        """End the present run after its round and begin another from the base weights."""
        body = given(client_selection=client_selection)
        return self._post(OperationView, "/api/training/restart", body, key=idempotency_key)

    def config(self) -> TrainingConfigView:
        """What the next round goes by."""
        return self._read(TrainingConfigView, "/api/training/config")

    def configure(
        self,
        *,
        min_clients: int | None = None,
        wait_timeout: float | None = None,
        if_match: str | None = None,
        idempotency_key: str | None = None,
    ) -> TrainingConfigView:
        """Change it for the next round and all after it; with the ``etag`` that was read, only if it still holds."""
        body = given(min_clients=min_clients, wait_timeout=wait_timeout)
        return self._post(TrainingConfigView, "/api/training/config", body, key=idempotency_key, if_match=if_match)


class Aggregation(Group):
    """How updates become a model."""

    def mode(self) -> AggregationModeView:
        """Whether rounds wait for their cohort."""
        return self._read(AggregationModeView, "/api/aggregation/mode")

    def set_mode(
        self,
        mode: AggregationMode,
        *,
        staleness_tolerance: int | None = None,
        buffer_size: int | None = None,
        if_match: str | None = None,
        idempotency_key: str | None = None,
    ) -> AggregationModeView:
        """Wait for the cohort, or fold whatever arrives; with the ``etag`` that was read, only if it still holds."""
        body = given(mode=mode, staleness_tolerance=staleness_tolerance, buffer_size=buffer_size)
        return self._post(AggregationModeView, "/api/aggregation/mode", body, key=idempotency_key, if_match=if_match)


class Model(Group):
    """Model versions, and which one serves."""

    def info(self) -> ModelInfo:
        """The served model: size in bytes by variant, complexity, classes."""
        return self._read(ModelInfo, "/api/model/info")

    def current(self) -> ModelView:
        """The version that replicas and vehicles are offered."""
        return self._read(ModelView, "/api/model/current")

    def versions(self, limit: int = 50, offset: int = 0) -> tuple[ModelView, ...]:
        """Model versions, newest first."""
        return self._read(tuple[ModelView, ...], "/api/model/versions", limit=limit, offset=offset)

    def iterate_versions(self, page_size: int = PAGE) -> Iterator[ModelView]:
        """Every model version, newest first."""
        return pages(self.versions, page_size)

    def release(self, variant: Variant | None = None) -> bytes:
        """The signed manifest of the current release, byte for byte as it was signed."""
        return self._caller.get("/api/model/release", variant=variant).content

    def blob(self, digest: str, max_bytes: int) -> bytes:
        """An artifact of the current release by its SHA-256, unverified, at most ``max_bytes``.

        The manifest of :meth:`release` names its length.
        """
        return self._caller.download(f"/api/model/blobs/{segment(digest)}", max_bytes)

    def rollback(
        self,
        version: str,
        *,
        force: bool = False,
        reason: str | None = None,
        idempotency_key: str | None = None,
    ) -> ReleaseView:
        """Make an older version's content current again, as a new and higher version."""
        body = given(version=version, force=force, reason=reason)
        return self._post(ReleaseView, "/api/model/rollback", body, key=idempotency_key)

    def switch(self, variant: Variant, *, idempotency_key: str | None = None) -> ReleaseView:
        """Move replicas and vehicles to another variant of the current version; harmless when repeated."""
        return self._post(ReleaseView, "/api/model/switch", {"variant": variant}, key=idempotency_key)

    def optimize(
        self, strategy: OptimizeStrategy, target_latency: float, *, idempotency_key: str | None = None
    ) -> OperationView:
        """Move the fleet to the most accurate variant whose p95 is at most ``target_latency`` milliseconds."""
        body = {"strategy": strategy, "target_latency": target_latency}
        return self._post(OperationView, "/api/edge/optimize", body, key=idempotency_key)

    def retrain(self, strategy: RetrainStrategy, *, idempotency_key: str | None = None) -> OperationView:
        """End the present run after its round and begin another, from the base weights or the current release's."""
        return self._post(OperationView, "/api/model/retrain", {"strategy": strategy}, key=idempotency_key)


class Operations(Group):
    """What outlasts a request."""

    def list(self, *statuses: OperationStatus, limit: int = 50, offset: int = 0) -> tuple[OperationView, ...]:
        """Operations, newest first; no statuses filter nothing."""
        status = [str(status) for status in statuses]
        return self._read(tuple[OperationView, ...], "/api/operations", status=status, limit=limit, offset=offset)

    def iterate(self, *statuses: OperationStatus, page_size: int = PAGE) -> Iterator[OperationView]:
        """Every operation, newest first."""
        return pages(lambda limit, offset: self.list(*statuses, limit=limit, offset=offset), page_size)

    def get(self, operation_id: str) -> OperationView:
        """One operation."""
        return self._read(OperationView, f"/api/operations/{segment(operation_id)}")

    def cancel(self, operation_id: str, *, idempotency_key: str | None = None) -> OperationView:
        """End it early: at once while it is queued, at its next step while it runs; harmless after its end."""
        path = f"/api/operations/{segment(operation_id)}"
        return self._post(OperationView, path, key=idempotency_key, method="DELETE")

    def wait(
        self,
        operation: OperationView | str,
        timeout_s: float | None = None,
        on_progress: Callable[[OperationView], None] | None = None,
    ) -> OperationView:
        """The operation once it has ended, well or not; ``on_progress`` is shown each step of the way.

        Raises:
            StillRunningError: it has not ended after ``timeout_s``; it goes on.
        """
        deadline_s = None if timeout_s is None else self._caller.clock.monotonic() + timeout_s
        current = self.get(operation) if isinstance(operation, str) else operation
        pause_s = FIRST_PAUSE_S
        while True:
            if on_progress is not None:
                on_progress(current)
            if current.status.ended:
                return current
            if deadline_s is not None and self._caller.clock.monotonic() >= deadline_s:
                raise StillRunningError(
                    f"The operation {current.operation_id} is still {current.status} after {timeout_s:g} s.",
                    cure=f"It goes on: `fedvit operation wait {current.operation_id}`.",
                    operation_id=current.operation_id,
                )
            self._caller.sleep(pause_s)
            pause_s = min(pause_s * BACK_OFF, LONGEST_PAUSE_S)
            current = self.get(current.operation_id)


class System(Group):
    """The system as a whole."""

    def healthz(self) -> Mapping[str, str]:
        """Whether a replica answers; needs no token."""
        return self._read(dict[str, str], "/healthz")

    def health(self) -> HealthView:
        """Whether each part answers, where training stands, what is released."""
        return self._read(HealthView, "/api/system/health")

    def metrics(self) -> str:
        """The Prometheus exposition of every process of the node."""
        return self._caller.get("/metrics").text

    def shutdown(
        self, mode: ShutdownMode = "graceful", *, save_state: bool = True, idempotency_key: str | None = None
    ) -> OperationView:
        """End the system: ``graceful`` after the round under way, ``force`` at once."""
        body = {"mode": mode, "save_state": save_state}
        return self._post(OperationView, "/api/system/shutdown", body, key=idempotency_key)


class Audit(Group):
    """The audit trail."""

    def lines(self, limit: int = 100, after: int | None = None) -> tuple[AuditView, ...]:
        """Lines, oldest first: those behind sequence ``after``, else the last ones."""
        return self._read(tuple[AuditView, ...], "/api/audit", limit=limit, after=after)

    def iterate(self, after: int = 0, page_size: int = PAGE) -> Iterator[AuditView]:
        """Every line behind sequence ``after``, oldest first."""
        while page := self.lines(page_size, after):
            yield from page
            after = page[-1].sequence
