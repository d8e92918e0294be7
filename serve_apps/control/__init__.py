"""The control API: routes by subject over the store and the actors, on Ray Serve."""
