"""Metric catalogue, export to Prometheus, alert rules and dashboards."""
