"""Ray actors around the library: aggregator, privacy accountant, client proxies, trainer, sweep.

Only ``actors.spawn`` calls ``ray.remote``.
"""
