"""Routes of health, metrics, shutdown and the audit trail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedvit.api.choices import ShutdownMode
from fedvit.api.operations import OperationView
from fedvit.api.system import AuditView, HealthView
from fedvit.client.caller import PAGE, Group


class System(Group):
    """The system as a whole."""

    def healthz(self) -> Mapping[str, str]:
        """Whether a replica answers; needs no token."""
        return self._caller.read(dict[str, str], "/healthz")

    def health(self) -> HealthView:
        """Whether each part answers, where training stands, what is released."""
        return self._caller.read(HealthView, "/api/system/health")

    def metrics(self) -> str:
        """The Prometheus exposition of every process of the node."""
        return self._caller.get("/metrics").text

    def shutdown(
        self, mode: ShutdownMode = "graceful", *, save_state: bool = True, idempotency_key: str | None = None
    ) -> OperationView:
        """End the system: ``graceful`` after the round under way, ``force`` at once."""
        body = {"mode": mode, "save_state": save_state}
        return self._caller.change(OperationView, "POST", "/api/system/shutdown", body, key=idempotency_key)


class Audit(Group):
    """The audit trail."""

    def lines(self, limit: int = 100, after: int | None = None) -> tuple[AuditView, ...]:
        """Lines, oldest first: those behind sequence ``after``, else the last ones."""
        return self._caller.read(tuple[AuditView, ...], "/api/audit", limit=limit, after=after)

    def iterate(self, after: int = 0, page_size: int = PAGE) -> Iterator[AuditView]:
        """Every line behind sequence ``after``, oldest first."""
        while page := self.lines(page_size, after):
            yield from page
            after = page[-1].sequence
