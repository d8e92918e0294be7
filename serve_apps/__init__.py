"""Ray Serve applications (control API and inference), and the start and stop of a whole system."""
