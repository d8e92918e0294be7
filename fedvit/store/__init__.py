"""What survives a restart: the state database (SQLAlchemy 2, Alembic) and the content-addressed blobs."""
