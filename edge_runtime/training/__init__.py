"""The vehicle's trainer, an optional part: it needs torch and the library's training, which serving does without."""
