"""Budget periods, clients' liveness and quarantine, tokens that speak for one client."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_CLIENT_COLUMNS = ("last_seen_at", "quarantined_at", "quarantine_reason")


def upgrade() -> None:
    """Nobody was seen, nobody is in quarantine, and no budget was granted anew."""
    op.add_column("clients", sa.Column("last_seen_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("clients", sa.Column("quarantined_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("clients", sa.Column("quarantine_reason", sa.Text(), nullable=True))
    op.add_column("tokens", sa.Column("client_id", sa.String(200), nullable=True))
    op.create_table(
        "budget_periods",
        sa.Column("sequence", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("target_epsilon", sa.Double(), nullable=False),
        sa.Column("justification", sa.Text(), nullable=False),
        sa.Column("requested_by", sa.String(200), nullable=False),
        sa.Column("approved_by", sa.String(200), nullable=True),
        sa.Column("ledger_sequence", sa.Integer(), nullable=False),
        sa.Column("prev_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )


def downgrade() -> None:
    """Granted budgets and quarantines are lost."""
    op.drop_table("budget_periods")
    with op.batch_alter_table("tokens") as table:
        table.drop_column("client_id")
    with op.batch_alter_table("clients") as table:
        for name in _CLIENT_COLUMNS:
            table.drop_column(name)
