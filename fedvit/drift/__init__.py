"""Private histograms of clients' data, and the drift and data-quality statistics computed on them."""
