"""Aggregation rules, one in each file, and the validation of updates."""
