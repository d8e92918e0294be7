"""The tables of the state database. Types are portable between SQLite and PostgreSQL.

A change here comes with a new revision in ``migrations/versions``; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware moment, in UTC; SQLite, which stores no zone, gives it back aware as well."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC; a naive moment is a programming error."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value.isoformat()} has no time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give the zone back that SQLite dropped."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Declarative base: how Python types become column types."""

    type_annotation_map = {
        float: Double(),
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        dict[str, str]: JSON(),
        dict[str, float]: JSON(),
        list[str]: JSON(),
    }


def _where(condition: str) -> dict[str, Any]:
    """The condition of a partial index."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


class MetaRow(Base):
    """Small facts about the state folder as a whole."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    value: Mapped[Any] = mapped_column(JSON())


class ClientRow(Base):
    """A vehicle or a depot."""

    __tablename__ = "clients"
    # Finds the few clients in quarantine of a large fleet without reading it.
    __table_args__ = (Index("ix_clients_quarantined", "client_id", **_where("quarantined_at IS NOT NULL")),)

    client_id: Mapped[str] = mapped_column(String(200), primary_key=True)
    # From 0, without gaps, and never changed: cohorts are drawn by position.
    position: Mapped[int] = mapped_column(index=True, unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    num_examples: Mapped[int]
    validated: Mapped[bool]
    active: Mapped[bool]
    registered_at: Mapped[datetime]
    capabilities: Mapped[dict[str, Any]]
    last_seen_at: Mapped[datetime | None]
    quarantined_at: Mapped[datetime | None]
    quarantine_reason: Mapped[str | None] = mapped_column(Text())
    admitted_examples: Mapped[int | None]


class RunRow(Base):
    """A training run."""

    __tablename__ = "runs"

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    ordinal: Mapped[int] = mapped_column(unique=True)
    status: Mapped[str] = mapped_column(String(32))
    rounds_total: Mapped[int]
    rounds_done: Mapped[int]
    noise_multiplier: Mapped[float]
    config: Mapped[dict[str, Any]]
    config_digest: Mapped[str] = mapped_column(String(64))
    data_digest: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    reason: Mapped[str | None] = mapped_column(Text())


class RoundRow(Base):
    """A round: opened with its cohort, later committed with its results."""

    __tablename__ = "rounds"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    round_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    cohort: Mapped[list[str]]
    opened_at: Mapped[datetime]
    committed_at: Mapped[datetime | None]
    loss: Mapped[float | None]
    accuracy: Mapped[float | None]
    epsilon: Mapped[float | None]
    num_updates: Mapped[int]
    duration_s: Mapped[float | None]


class ClientRoundRow(Base):
    """The outcome of one client in one committed round."""

    __tablename__ = "client_rounds"
    __table_args__ = (
        Index("ix_client_rounds_client", "client_id", "run_id", "round_index"),
        ForeignKeyConstraint(["run_id", "round_index"], ["rounds.run_id", "rounds.round_index"]),
    )

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    round_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    client_id: Mapped[str] = mapped_column(String(200), primary_key=True)
    num_examples: Mapped[int]
    error: Mapped[str | None] = mapped_column(Text())
    update_norm: Mapped[float | None]
    alignment: Mapped[float | None]


class HistogramRow(Base):
    """A client's private histogram of its data in one round: noised counts, little-endian int32. Append-only."""

    __tablename__ = "histograms"
    __table_args__ = (Index("ix_histograms_client", "client_id", "at"),)

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    round_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    client_id: Mapped[str] = mapped_column(String(200), primary_key=True)
    at: Mapped[datetime]
    num_examples: Mapped[int]
    spec_digest: Mapped[str] = mapped_column(String(64))
    deviation: Mapped[float]
    counts: Mapped[bytes] = mapped_column(LargeBinary())


class VersionRow(Base):
    """A model version. A round trains at most one; others are derived."""

    __tablename__ = "model_versions"
    __table_args__ = (
        UniqueConstraint("run_ordinal", "number"),
        Index("ix_model_versions_trained", "run_id", "round_index", unique=True, **_where("derived_from IS NULL")),
        ForeignKeyConstraint(["run_id", "round_index"], ["rounds.run_id", "rounds.round_index"]),
    )

    version: Mapped[str] = mapped_column(String(64), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64))
    round_index: Mapped[int]
    # The two parts of the version number again, as numbers: text would put v1.1.10 before v1.1.9.
    run_ordinal: Mapped[int]
    number: Mapped[int]
    weights_digest: Mapped[str] = mapped_column(String(64))
    frozen_digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    epsilon: Mapped[float]
    metrics: Mapped[dict[str, float]]
    lineage: Mapped[dict[str, Any]]
    artifacts: Mapped[dict[str, str]]
    derived_from: Mapped[str | None] = mapped_column(String(64))
    refusal: Mapped[str | None] = mapped_column(Text())


class ReleaseRow(Base):
    """A release: the version and variant that replicas and vehicles run from then on. Append-only."""

    __tablename__ = "releases"

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[str] = mapped_column(ForeignKey("model_versions.version"))
    at: Mapped[datetime]
    reason: Mapped[str] = mapped_column(Text())
    artifacts: Mapped[dict[str, str]]
    envelopes: Mapped[dict[str, str]]
    serve_variant: Mapped[str | None] = mapped_column(String(64))


class OperationRow(Base):
    """A long operation."""

    __tablename__ = "operations"

    operation_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    ordinal: Mapped[int] = mapped_column(unique=True)
    kind: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    progress: Mapped[float]
    stage: Mapped[str] = mapped_column(Text())
    params: Mapped[dict[str, Any]]
    # none_as_null: absent is SQL's NULL, not JSON's.
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    cancel_requested: Mapped[bool]
    call_key: Mapped[str | None] = mapped_column(String(200), unique=True)


class ChargeRow(Base):
    """A line of the privacy ledger. Append-only, hash-chained, without foreign keys: it outlives what it names."""

    __tablename__ = "privacy_ledger"
    __table_args__ = (
        UniqueConstraint("run_id", "round_index", "unit_id", "output_id"),
        Index("ix_privacy_ledger_unit", "unit_id", "run_id", "round_index"),
    )

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(index=True)
    run_id: Mapped[str] = mapped_column(String(64))
    round_index: Mapped[int]
    unit_id: Mapped[str] = mapped_column(String(200))
    output_id: Mapped[str] = mapped_column(String(64))
    noise_multiplier: Mapped[float]
    sampling_prob: Mapped[float]
    steps: Mapped[int]
    privacy_unit: Mapped[str] = mapped_column(String(16), server_default="record")
    event: Mapped[str | None] = mapped_column(Text())
    prev_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class BudgetPeriodRow(Base):
    """A privacy budget that was granted; only charges after ``ledger_sequence`` count against it.

    Append-only and hash-chained.
    """

    __tablename__ = "budget_periods"

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    target_epsilon: Mapped[float]
    justification: Mapped[str] = mapped_column(Text())
    requested_by: Mapped[str] = mapped_column(String(200))
    approved_by: Mapped[str | None] = mapped_column(String(200))
    ledger_sequence: Mapped[int]
    prev_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class TokenRow(Base):
    """A bearer token; of its secret only the hash. Revoked ones stay, so that audit lines keep their name."""

    __tablename__ = "tokens"

    token_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    secret_hash: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    client_id: Mapped[str | None] = mapped_column(String(200))


class AuditRow(Base):
    """A line of the audit trail: who asked for what, and what it changed. Append-only, hash-chained."""

    __tablename__ = "audit"

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(index=True)
    actor: Mapped[str] = mapped_column(String(200))
    scopes: Mapped[list[str]]
    source: Mapped[str] = mapped_column(String(64))
    request_id: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(200))
    params: Mapped[dict[str, Any]]
    before: Mapped[Any] = mapped_column(JSON(none_as_null=True), nullable=True)
    after: Mapped[Any] = mapped_column(JSON(none_as_null=True), nullable=True)
    status: Mapped[int]
    prev_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class IdempotencyRow(Base):
    """A mutating request that named an idempotency key, and its response; without one it is still under way."""

    __tablename__ = "idempotency"

    actor: Mapped[str] = mapped_column(String(200), primary_key=True)
    route: Mapped[str] = mapped_column(String(200), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_hash: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(index=True)
    status: Mapped[int | None]
    body: Mapped[str | None] = mapped_column(Text())
    media_type: Mapped[str | None] = mapped_column(String(100))
    headers: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class IncidentRow(Base):
    """An incident, from the first alert of a name to the end of the last."""

    __tablename__ = "incidents"
    __table_args__ = (Index("ix_incidents_alertname", "alertname", "ordinal"),)

    incident_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    ordinal: Mapped[int] = mapped_column(unique=True)
    alertname: Mapped[str] = mapped_column(String(200))
    severity: Mapped[str] = mapped_column(String(2))
    summary: Mapped[str] = mapped_column(Text())
    opened_at: Mapped[datetime]
    resolved_at: Mapped[datetime | None]


class IncidentAlertRow(Base):
    """One firing of one alert, from ``starts_at`` to ``ends_at``; a repeated message finds it."""

    __tablename__ = "incident_alerts"

    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(primary_key=True)
    incident_id: Mapped[str] = mapped_column(ForeignKey("incidents.incident_id"), index=True)
    alertname: Mapped[str] = mapped_column(String(200))
    severity: Mapped[str] = mapped_column(String(2))
    labels: Mapped[dict[str, str]]
    annotations: Mapped[dict[str, str]]
    generator_url: Mapped[str] = mapped_column(Text())
    received_at: Mapped[datetime]
    ends_at: Mapped[datetime | None]


class IncidentEventRow(Base):
    """A line of an incident's own history: opened, reopened, resolved, or an operator's note. Append-only."""

    __tablename__ = "incident_events"

    incident_id: Mapped[str] = mapped_column(ForeignKey("incidents.incident_id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(32))
    actor: Mapped[str] = mapped_column(String(200))
    text: Mapped[str] = mapped_column(Text())


class RemediationRow(Base):
    """An automatic remediation of one firing, or why it was withheld."""

    __tablename__ = "remediations"

    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(primary_key=True)
    action: Mapped[str] = mapped_column(String(64), primary_key=True)
    incident_id: Mapped[str] = mapped_column(ForeignKey("incidents.incident_id"), index=True)
    target: Mapped[str | None] = mapped_column(String(200))
    at: Mapped[datetime]
    outcome: Mapped[str] = mapped_column(String(16), index=True)
    detail: Mapped[str] = mapped_column(Text())
