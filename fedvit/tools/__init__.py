"""Programs built on the library: simulation, sweep, report, audit, monitoring stack."""
