"""Privacy audit: checks of the installed code against the assumptions of the accountant."""
