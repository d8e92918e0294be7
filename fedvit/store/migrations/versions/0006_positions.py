"""A position for every client, so that some of very many can be drawn without reading all."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Known clients are numbered in the order of their ids."""
    op.add_column("clients", sa.Column("position", sa.Integer(), nullable=True))
    op.execute(
        "UPDATE clients SET position = numbered.at FROM "
        "(SELECT client_id, row_number() OVER (ORDER BY client_id) - 1 AS at FROM clients) AS numbered "
        "WHERE numbered.client_id = clients.client_id"
    )
    with op.batch_alter_table("clients") as table:
        table.alter_column("position", existing_type=sa.Integer(), nullable=False)
        table.create_index("ix_clients_position", ["position"], unique=True)
    quarantined = sa.text("quarantined_at IS NOT NULL")
    op.create_index(
        "ix_clients_quarantined", "clients", ["client_id"], sqlite_where=quarantined, postgresql_where=quarantined
    )
    op.create_index("ix_privacy_ledger_unit", "privacy_ledger", ["unit_id", "run_id", "round_index"])
    op.create_index("ix_client_rounds_client", "client_rounds", ["client_id", "run_id", "round_index"])


def downgrade() -> None:
    """Nothing is lost but the numbers."""
    op.drop_index("ix_client_rounds_client", "client_rounds")
    op.drop_index("ix_privacy_ledger_unit", "privacy_ledger")
    op.drop_index("ix_clients_quarantined", "clients")
    with op.batch_alter_table("clients") as table:
        table.drop_index("ix_clients_position")
        table.drop_column("position")
