"""The command line ``fedvit``: commands in modules by subject, and their shared options."""
