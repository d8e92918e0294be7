"""HTML reports with charts: of a run, of simulations and of a sweep."""
