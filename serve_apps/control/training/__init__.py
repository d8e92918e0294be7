"""Routes about training: its loop, its settings, aggregation, and long operations."""
