"""Does the code do what the accountant assumes? Checks of the very modules that train, clip, add noise and charge."""
