"""Derived versions, the variant that the fleet runs, and long operations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Several versions may now stand on one round: the trained one, and those made from it."""
    # SQLite cannot drop a constraint without a name: the table is copied into one that never had it.
    with op.batch_alter_table("model_versions", copy_from=_versions(), recreate="always") as table:
        table.add_column(sa.Column("derived_from", sa.String(64), nullable=True))
        table.add_column(sa.Column("refusal", sa.Text(), nullable=True))
    trained = sa.text("derived_from IS NULL")
    op.create_index(
        "ix_model_versions_trained",
        "model_versions",
        ["run_id", "round_index"],
        unique=True,
        sqlite_where=trained,
        postgresql_where=trained,
    )
    op.add_column("releases", sa.Column("serve_variant", sa.String(64), nullable=True))
    _create_operations()


def downgrade() -> None:
    """Back to one version a round; derived versions and their releases are lost."""
    op.drop_table("operations")
    op.execute(
        "DELETE FROM releases WHERE version IN (SELECT version FROM model_versions WHERE derived_from IS NOT NULL)"
    )
    op.execute("DELETE FROM model_versions WHERE derived_from IS NOT NULL")
    op.drop_index("ix_model_versions_trained", "model_versions")
    with op.batch_alter_table("releases") as table:
        table.drop_column("serve_variant")
    made = _versions(sa.Column("derived_from", sa.String(64)), sa.Column("refusal", sa.Text()), one_a_round=True)
    with op.batch_alter_table("model_versions", copy_from=made, recreate="always") as table:
        table.drop_column("derived_from")
        table.drop_column("refusal")


def _versions(*more: sa.Column[str], one_a_round: bool = False) -> sa.Table:
    return sa.Table(
        "model_versions",
        sa.MetaData(),
        sa.Column("version", sa.String(64), primary_key=True),
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("round_index", sa.Integer(), nullable=False),
        sa.Column("run_ordinal", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("weights_digest", sa.String(64), nullable=False),
        sa.Column("frozen_digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("epsilon", sa.Double(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("lineage", sa.JSON(), nullable=False),
        sa.Column("artifacts", sa.JSON(), nullable=False),
        *more,
        sa.UniqueConstraint("run_ordinal", "number"),
        *([sa.UniqueConstraint("run_id", "round_index")] if one_a_round else []),
        sa.ForeignKeyConstraint(["run_id", "round_index"], ["rounds.run_id", "rounds.round_index"]),
    )


def _create_operations() -> None:
    op.create_table(
        "operations",
        sa.Column("operation_id", sa.String(64), primary_key=True),
        sa.Column("ordinal", sa.Integer(), nullable=False, unique=True),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("call_key", sa.String(200), nullable=True, unique=True),
    )
