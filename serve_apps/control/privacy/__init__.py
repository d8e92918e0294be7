"""Routes about the privacy budget and about privacy breaches."""
