"""Rehearsals of incidents: the fault is real, and so are the system, Prometheus and the runbook's commands."""
