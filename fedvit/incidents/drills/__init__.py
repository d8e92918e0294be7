"""Drills of incidents: a real fault in a real system, a real Prometheus, and the runbook's commands."""
