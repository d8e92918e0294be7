"""Scenarios of the drills, one incident in each file."""
