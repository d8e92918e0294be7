"""Simulation of a fleet in virtual time, with delays, dropouts and faulty clients."""
