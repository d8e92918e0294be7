"""Serialisation of updates, tensors, histograms, statistics and manifests: safetensors and JSON, never pickle."""
