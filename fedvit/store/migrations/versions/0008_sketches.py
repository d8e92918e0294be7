"""What clients tell of their data in noised counts, and what is seen of their noised updates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fedvit.store.tables import UtcDateTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Earlier rounds saw nothing of either."""
    op.create_table(
        "sketches",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("round_index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("client_id", sa.String(200), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("num_examples", sa.Integer(), nullable=False),
        sa.Column("spec_digest", sa.String(64), nullable=False),
        sa.Column("deviation", sa.Double(), nullable=False),
        sa.Column("counts", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "round_index", "client_id"),
    )
    op.create_index("ix_sketches_client", "sketches", ["client_id", "at"])
    op.add_column("client_rounds", sa.Column("update_norm", sa.Double(), nullable=True))
    op.add_column("client_rounds", sa.Column("alignment", sa.Double(), nullable=True))


def downgrade() -> None:
    """What was told and seen is lost; what it cost stays on the ledger."""
    op.drop_column("client_rounds", "alignment")
    op.drop_column("client_rounds", "update_norm")
    op.drop_index("ix_sketches_client", "sketches")
    op.drop_table("sketches")
