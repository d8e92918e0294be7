"""Routes about the system as a whole: health, metrics, shutdown, audit trail; and the in-process client."""
