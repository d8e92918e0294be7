"""The initial schema."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = None
branch_labels = None
depends_on = None

INTEGER, DOUBLE, TEXT, MOMENT = sa.Integer, sa.Double, sa.Text, sa.DateTime(timezone=True)
STR64, STR200, JSON, NULLABLE_JSON = sa.String(64), sa.String(200), sa.JSON(), sa.JSON(none_as_null=True)


def _required(**columns: Any) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, autoincrement=False, nullable=False) for name, kind in columns.items()]


def _optional(**columns: Any) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, autoincrement=False, nullable=True) for name, kind in columns.items()]


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "audit",
        *_required(sequence=INTEGER, at=MOMENT, actor=STR200, scopes=JSON, source=STR64, request_id=STR64),
        *_required(action=STR200, params=JSON),
        *_optional(before=NULLABLE_JSON, after=NULLABLE_JSON),
        *_required(status=INTEGER, prev_hash=STR64, hash=STR64),
        sa.PrimaryKeyConstraint("sequence"),
    )
    op.create_index("ix_audit_at", "audit", ["at"])
    op.create_table(
        "budget_periods",
        *_required(sequence=INTEGER, at=MOMENT, target_epsilon=DOUBLE, justification=TEXT, requested_by=STR200),
        *_optional(approved_by=STR200),
        *_required(ledger_sequence=INTEGER, prev_hash=STR64, hash=STR64),
        sa.PrimaryKeyConstraint("sequence"),
    )
    op.create_table(
        "clients",
        *_required(client_id=STR200, position=INTEGER, kind=sa.String(16), num_examples=INTEGER, validated=sa.Boolean),
        *_required(active=sa.Boolean, registered_at=MOMENT, capabilities=JSON),
        *_optional(last_seen_at=MOMENT, quarantined_at=MOMENT, quarantine_reason=TEXT),
        sa.PrimaryKeyConstraint("client_id"),
    )
    op.create_index("ix_clients_position", "clients", ["position"], unique=True)
    op.create_index("ix_clients_quarantined", "clients", ["client_id"], **_where("quarantined_at IS NOT NULL"))
    op.create_table(
        "histograms",
        *_required(run_id=STR64, round_index=INTEGER, client_id=STR200, at=MOMENT, num_examples=INTEGER),
        *_required(spec_digest=STR64, deviation=DOUBLE, counts=sa.LargeBinary),
        sa.PrimaryKeyConstraint("run_id", "round_index", "client_id"),
    )
    op.create_index("ix_histograms_client", "histograms", ["client_id", "at"])
    op.create_table(
        "idempotency",
        *_required(actor=STR200, route=STR200, key=STR200, request_hash=STR64, at=MOMENT),
        *_optional(status=INTEGER, body=TEXT, media_type=sa.String(100), headers=NULLABLE_JSON),
        sa.PrimaryKeyConstraint("actor", "route", "key"),
    )
    op.create_index("ix_idempotency_at", "idempotency", ["at"])
    op.create_table(
        "incidents",
        *_required(incident_id=STR64, ordinal=INTEGER, alertname=STR200, severity=sa.String(2), summary=TEXT),
        *_required(opened_at=MOMENT),
        *_optional(resolved_at=MOMENT),
        sa.PrimaryKeyConstraint("incident_id"),
        sa.UniqueConstraint("ordinal"),
    )
    op.create_index("ix_incidents_alertname", "incidents", ["alertname", "ordinal"])
    op.create_table("meta", *_required(key=STR200, value=JSON), sa.PrimaryKeyConstraint("key"))
    op.create_table(
        "operations",
        *_required(operation_id=STR64, ordinal=INTEGER, kind=STR64, status=sa.String(16), progress=DOUBLE, stage=TEXT),
        *_required(params=JSON),
        *_optional(result=NULLABLE_JSON, error=NULLABLE_JSON),
        *_required(created_at=MOMENT),
        *_optional(started_at=MOMENT, ended_at=MOMENT),
        *_required(cancel_requested=sa.Boolean),
        *_optional(call_key=STR200),
        sa.PrimaryKeyConstraint("operation_id"),
        sa.UniqueConstraint("call_key"),
        sa.UniqueConstraint("ordinal"),
    )
    op.create_table(
        "privacy_ledger",
        *_required(sequence=INTEGER, at=MOMENT, run_id=STR64, round_index=INTEGER, unit_id=STR200, output_id=STR64),
        *_required(noise_multiplier=DOUBLE, sampling_prob=DOUBLE, steps=INTEGER),
        sa.Column("privacy_unit", sa.String(16), server_default="record", nullable=False),
        *_optional(event=TEXT),
        *_required(prev_hash=STR64, hash=STR64),
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("run_id", "round_index", "unit_id", "output_id"),
    )
    op.create_index("ix_privacy_ledger_at", "privacy_ledger", ["at"])
    op.create_index("ix_privacy_ledger_unit", "privacy_ledger", ["unit_id", "run_id", "round_index"])
    op.create_table(
        "runs",
        *_required(run_id=STR64, ordinal=INTEGER, status=sa.String(32), rounds_total=INTEGER, rounds_done=INTEGER),
        *_required(noise_multiplier=DOUBLE, config=JSON, config_digest=STR64, data_digest=STR64, started_at=MOMENT),
        *_optional(ended_at=MOMENT, reason=TEXT),
        sa.PrimaryKeyConstraint("run_id"),
        sa.UniqueConstraint("ordinal"),
    )
    op.create_table(
        "tokens",
        *_required(token_id=sa.String(32), name=STR200, secret_hash=STR64, scopes=JSON, created_at=MOMENT),
        *_optional(expires_at=MOMENT, revoked_at=MOMENT, last_used_at=MOMENT, client_id=STR200),
        sa.PrimaryKeyConstraint("token_id"),
    )
    op.create_table(
        "incident_alerts",
        *_required(fingerprint=STR64, starts_at=MOMENT, incident_id=STR64, alertname=STR200, severity=sa.String(2)),
        *_required(labels=JSON, annotations=JSON, generator_url=TEXT, received_at=MOMENT),
        *_optional(ends_at=MOMENT),
        sa.ForeignKeyConstraint(["incident_id"], ["incidents.incident_id"]),
        sa.PrimaryKeyConstraint("fingerprint", "starts_at"),
    )
    op.create_index("ix_incident_alerts_incident_id", "incident_alerts", ["incident_id"])
    op.create_table(
        "incident_events",
        *_required(incident_id=STR64, sequence=INTEGER, at=MOMENT, kind=sa.String(32), actor=STR200, text=TEXT),
        sa.ForeignKeyConstraint(["incident_id"], ["incidents.incident_id"]),
        sa.PrimaryKeyConstraint("incident_id", "sequence"),
    )
    op.create_table(
        "remediations",
        *_required(fingerprint=STR64, starts_at=MOMENT, action=STR64, incident_id=STR64),
        *_optional(target=STR200),
        *_required(at=MOMENT, outcome=sa.String(16), detail=TEXT),
        sa.ForeignKeyConstraint(["incident_id"], ["incidents.incident_id"]),
        sa.PrimaryKeyConstraint("fingerprint", "starts_at", "action"),
    )
    op.create_index("ix_remediations_incident_id", "remediations", ["incident_id"])
    op.create_index("ix_remediations_outcome", "remediations", ["outcome"])
    op.create_table(
        "rounds",
        *_required(run_id=STR64, round_index=INTEGER, cohort=JSON, opened_at=MOMENT),
        *_optional(committed_at=MOMENT, loss=DOUBLE, accuracy=DOUBLE, epsilon=DOUBLE),
        *_required(num_updates=INTEGER),
        *_optional(duration_s=DOUBLE),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"]),
        sa.PrimaryKeyConstraint("run_id", "round_index"),
    )
    op.create_table(
        "client_rounds",
        *_required(run_id=STR64, round_index=INTEGER, client_id=STR200, num_examples=INTEGER),
        *_optional(error=TEXT, update_norm=DOUBLE, alignment=DOUBLE),
        sa.ForeignKeyConstraint(["run_id", "round_index"], ["rounds.run_id", "rounds.round_index"]),
        sa.PrimaryKeyConstraint("run_id", "round_index", "client_id"),
    )
    op.create_index("ix_client_rounds_client", "client_rounds", ["client_id", "run_id", "round_index"])
    op.create_table(
        "model_versions",
        *_required(version=STR64, run_id=STR64, round_index=INTEGER, run_ordinal=INTEGER, number=INTEGER),
        *_required(weights_digest=STR64, frozen_digest=STR64, created_at=MOMENT, epsilon=DOUBLE, metrics=JSON),
        *_required(lineage=JSON, artifacts=JSON),
        *_optional(derived_from=STR64, refusal=TEXT),
        sa.ForeignKeyConstraint(["run_id", "round_index"], ["rounds.run_id", "rounds.round_index"]),
        sa.PrimaryKeyConstraint("version"),
        sa.UniqueConstraint("run_ordinal", "number"),
    )
    trained = _where("derived_from IS NULL")
    op.create_index("ix_model_versions_trained", "model_versions", ["run_id", "round_index"], unique=True, **trained)
    op.create_table(
        "releases",
        *_required(sequence=INTEGER, version=STR64, at=MOMENT, reason=TEXT, artifacts=JSON, envelopes=JSON),
        *_optional(serve_variant=STR64),
        sa.ForeignKeyConstraint(["version"], ["model_versions.version"]),
        sa.PrimaryKeyConstraint("sequence"),
    )


def downgrade() -> None:
    """Drop every table, those that refer to others first."""
    incidents = ("remediations", "incident_events", "incident_alerts", "incidents")
    rounds = ("releases", "model_versions", "client_rounds", "rounds", "runs")
    records = ("privacy_ledger", "budget_periods", "audit", "histograms", "operations", "idempotency")
    for table in (*incidents, *rounds, *records, "tokens", "meta", "clients"):
        op.drop_table(table)
