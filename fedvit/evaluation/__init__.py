"""The global model on the server: evaluation on held-out images, export."""
