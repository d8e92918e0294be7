"""Routes about model versions and releases."""
