"""Run by Alembic: applies revisions on the connection that :mod:`fedvit.store.database` hands over."""

from __future__ import annotations

from alembic import context

from fedvit.store.tables import Base

# The caller owns the transaction, so that all revisions of one upgrade are applied or none. Batch mode, because SQLite
# alters a table by building another one.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
