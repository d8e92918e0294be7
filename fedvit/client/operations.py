"""Long operations: watched, awaited and ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedvit.api.operations import OperationView
from fedvit.client.caller import segment
from fedvit.client.group import PAGE, Group, pages
from fedvit.errors import StillRunningError
from fedvit.types import OperationStatus

FIRST_PAUSE_S, LONGEST_PAUSE_S, BACK_OFF = 0.25, 5.0, 1.5


class Operations(Group):
    """What outlasts a request."""

    def list(self, *statuses: OperationStatus, limit: int = 50, offset: int = 0) -> tuple[OperationView, ...]:
        """Operations, newest first; no statuses filter nothing."""
        status = [str(status) for status in statuses]
        kind = tuple[OperationView, ...]
        return self._caller.read(kind, "/api/operations", status=status, limit=limit, offset=offset)

    def iterate(self, *statuses: OperationStatus, page_size: int = PAGE) -> Iterator[OperationView]:
        """Every operation, newest first."""
        return pages(lambda limit, offset: self.list(*statuses, limit=limit, offset=offset), page_size)

    def get(self, operation_id: str) -> OperationView:
        """One operation."""
        return self._caller.read(OperationView, f"/api/operations/{segment(operation_id)}")

    def cancel(self, operation_id: str, *, idempotency_key: str | None = None) -> OperationView:
        """End it early: at once while it is queued, at its next step while it runs; harmless after its end."""
        path = f"/api/operations/{segment(operation_id)}"
        return self._caller.change(OperationView, "DELETE", path, key=idempotency_key)

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
                raise _still_running(current, timeout_s)
            self._caller.sleep(pause_s)
            pause_s = min(pause_s * BACK_OFF, LONGEST_PAUSE_S)
            current = self.get(current.operation_id)


def _still_running(operation: OperationView, timeout_s: float | None) -> StillRunningError:
    return StillRunningError(
        f"The operation {operation.operation_id} is still {operation.status} after {timeout_s:g} s.",
        cure=f"It goes on: `fedvit operation wait {operation.operation_id}`.",
        operation_id=operation.operation_id,
    )
