"""Per-example gradients and DP-SGD: op interceptor, gradient recorder, gradient engines, private optimiser."""
