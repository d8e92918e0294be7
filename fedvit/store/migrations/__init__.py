"""The Alembic environment, shipped with the package so that an installed fedvit migrates its own state."""
