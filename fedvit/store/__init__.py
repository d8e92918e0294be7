"""Durable state: repositories over one database (SQLAlchemy 2, Alembic), content-addressed blobs, backup, restore."""
