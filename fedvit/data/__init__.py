"""Image data sets, their manifests, and their partition among virtual clients."""
