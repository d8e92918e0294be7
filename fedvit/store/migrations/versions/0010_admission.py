"""The number of examples that each client is admitted with. Clients of an older state were all admitted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_PLAUSIBLE = 10_000_000


def upgrade() -> None:
    """Add the column, and admit every client whose number of examples is plausible."""
    op.add_column("clients", sa.Column("admitted_examples", sa.Integer, nullable=True))
    clients = sa.table("clients", sa.column("num_examples", sa.Integer), sa.column("admitted_examples", sa.Integer))
    plausible = clients.c.num_examples <= _PLAUSIBLE
    op.execute(sa.update(clients).where(plausible).values(admitted_examples=clients.c.num_examples))


def downgrade() -> None:
    """Drop the column."""
    with op.batch_alter_table("clients") as table:
        table.drop_column("admitted_examples")
