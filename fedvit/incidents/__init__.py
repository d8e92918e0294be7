"""Incident log, playbook, remediation, breach response and drills."""
