"""The eight incidents, one file each. What each does is told by its ``DRILL``."""
