"""Per-example gradients and DP-SGD: call interceptor, gradient recorder, engines, private optimiser."""
