"""The parts of a system's start, each with its way to stop: checks, Ray, actors, Serve applications, edge processes."""
