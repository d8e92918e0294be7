"""Routes of the incident log, and the reading of Alertmanager's messages."""
