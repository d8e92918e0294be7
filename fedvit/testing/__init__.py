"""Test doubles of the ports, shipped with the package."""
