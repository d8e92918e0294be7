"""The vehicle's trainer, an optional part that needs torch and imports the library's training."""
