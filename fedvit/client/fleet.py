"""Routes of clients, data drift and the backup channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedvit.api.choices import HeartbeatStatus, RemoteKind
from fedvit.api.clients import (
    BackupView,
    ClientsStatus,
    ClientView,
    ConnectivityView,
    HeartbeatView,
    HistogramReceipt,
    PhaseReceiptView,
    ReceiptView,
    RemoteTaskView,
    SecurePhase,
)
from fedvit.api.data_health import DriftView, QualityView
from fedvit.client.caller import PAGE, Group, given, pages, segment


class Clients(Group):
    """Clients: registration, validation, heartbeats, tasks and updates."""

    def status(self, limit: int = 100, offset: int = 0) -> ClientsStatus:
        """A page of clients, and the totals."""
        return self._read(ClientsStatus, "/api/clients/status", limit=limit, offset=offset)

    def iterate(self, page_size: int = PAGE) -> Iterator[ClientView]:
        """Every client."""
        return pages(lambda limit, offset: self.status(limit, offset).clients, page_size)

    def get(self, client_id: str) -> ClientView:
        """One client."""
        return self._read(ClientView, f"/api/clients/{segment(client_id)}")

    def register(
        self,
        device_id: str,
        *,
        kind: RemoteKind = "remote",
        num_examples: int = 0,
        capabilities: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> ClientView:
        """Add a vehicle, or bring one back; registering twice is harmless."""
        body = given(device_id=device_id, kind=kind, num_examples=num_examples, capabilities=capabilities)
        return self._post(ClientView, "/api/clients/register", body, key=idempotency_key)

    def remove(self, client_id: str, *, idempotency_key: str | None = None) -> ClientView:
        """Remove a client with its task and its stored update; its record and its privacy spend remain."""
        return self._post(ClientView, f"/api/clients/{segment(client_id)}", key=idempotency_key, method="DELETE")

    def validate(
        self,
        client_id: str,
        validated: bool = True,
        *,
        reason: str | None = None,
        num_examples: int | None = None,
        idempotency_key: str | None = None,
    ) -> ClientView:
        """Say whether a client's data was checked; if so, admit it with at most ``num_examples`` examples."""
        body = given(validated=validated, reason=reason, num_examples=num_examples)
        return self._post(ClientView, f"/api/clients/{segment(client_id)}/validate", body, key=idempotency_key)

    def reinstate(self, client_id: str, justification: str, *, idempotency_key: str | None = None) -> ClientView:
        """Lift a client's quarantine."""
        body = {"justification": justification}
        return self._post(ClientView, f"/api/clients/{segment(client_id)}/reinstate", body, key=idempotency_key)

    def heartbeat(
        self, client_id: str, *, status: HeartbeatStatus = "ok", model_version: str | None = None
    ) -> HeartbeatView:
        """Say that a vehicle is there. Not repeated when the line breaks: the next one does as well."""
        body = given(status=status, model_version=model_version)
        return self._post(HeartbeatView, f"/api/clients/{segment(client_id)}/heartbeat", body, repeatable=False)

    def task(self, client_id: str) -> RemoteTaskView:
        """What a remote client shall train now, if anything."""
        return self._read(RemoteTaskView, f"/api/clients/{segment(client_id)}/task")

    def task_weights(self, client_id: str, max_bytes: int) -> bytes:
        """What its task starts from, as safetensors; unverified, at most ``max_bytes``."""
        return self._caller.download(f"/api/clients/{segment(client_id)}/task/weights", max_bytes)

    def upload(self, client_id: str, run_id: str, round_index: int, update: bytes) -> ReceiptView:
        """Bring what a client learned in a round; repeating it does nothing."""
        path = f"/api/clients/{segment(client_id)}/updates/{segment(run_id)}/{round_index}"
        return self._caller.parsed(ReceiptView, self._caller.put(path, update))

    def answer(self, client_id: str, session: str, phase: SecurePhase, update: bytes) -> PhaseReceiptView:
        """Bring a client's answer to one phase of its secure aggregation session; repeating it does nothing."""
        path = f"/api/clients/{segment(client_id)}/sessions/{segment(session)}/{phase}"
        return self._caller.parsed(PhaseReceiptView, self._caller.put(path, update))

    def histogram(self, client_id: str, run_id: str, round_index: int, counts: Sequence[int]) -> HistogramReceipt:
        """Bring a client's noised counts; repeating it does nothing."""
        path = f"/api/clients/{segment(client_id)}/histograms/{segment(run_id)}/{round_index}"
        return self._post(HistogramReceipt, path, {"counts": list(counts)}, method="PUT")

    def receipt(self, client_id: str, run_id: str, round_index: int) -> ReceiptView:
        """What became of a client's update to a round."""
        return self._read(ReceiptView, f"/api/clients/{segment(client_id)}/updates/{segment(run_id)}/{round_index}")

    def connectivity(self, limit: int = 100, offset: int = 0) -> ConnectivityView:
        """Who is heard; the page is one of the clients that are not."""
        return self._read(ConnectivityView, "/api/clients/connectivity", limit=limit, offset=offset)

    def data_quality(self, limit: int = 100, offset: int = 0) -> QualityView:
        """How far the clients' contributions can be trusted."""
        return self._read(QualityView, "/api/clients/data-quality", limit=limit, offset=offset)


class Monitoring(Group):
    """Data drift."""

    def data_drift(self) -> DriftView:
        """Whether what vehicles see has moved away from what the model learned."""
        return self._read(DriftView, "/api/monitoring/data-drift")


class Communication(Group):
    """The backup channel: a mailbox for vehicles that cannot reach the API."""

    def backup(self) -> BackupView:
        """Whether it is open, and what went through it."""
        return self._read(BackupView, "/api/communication/backup")

    def enable_backup(self, *, idempotency_key: str | None = None) -> BackupView:
        """Open it; harmless when repeated."""
        return self._post(BackupView, "/api/communication/enable-backup", key=idempotency_key)

    def disable_backup(self, *, idempotency_key: str | None = None) -> BackupView:
        """Close it; harmless when repeated."""
        return self._post(BackupView, "/api/communication/disable-backup", key=idempotency_key)
