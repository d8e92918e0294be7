"""What runs on a client: local training, update encoding, update statistics, the client host, workloads."""
