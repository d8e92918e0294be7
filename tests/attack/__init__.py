"""Attacks on a running system and on a vehicle, with what each of them achieved. ``make attack`` runs them in full."""
