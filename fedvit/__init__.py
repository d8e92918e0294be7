"""Federated training and edge serving of Vision Transformers under differential privacy."""
