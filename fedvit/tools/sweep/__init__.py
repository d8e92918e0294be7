"""Sweeps over settings: trials in virtual time, successive halving, and the privacy cost of the selection."""
