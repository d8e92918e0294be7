"""Charges of any event, for records or for whole clients."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """All that was charged before were Poisson-sampled Gaussian steps on records."""
    with op.batch_alter_table("privacy_ledger") as table:
        table.add_column(sa.Column("privacy_unit", sa.String(16), nullable=False, server_default="record"))
        table.add_column(sa.Column("event", sa.Text(), nullable=True))


def downgrade() -> None:
    """Charges of other events cannot be told any more, and the chain is broken at the first of them."""
    with op.batch_alter_table("privacy_ledger") as table:
        table.drop_column("event")
        table.drop_column("privacy_unit")
