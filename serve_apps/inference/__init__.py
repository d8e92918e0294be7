"""The inference application: replicas that run the vehicle's engine and routes."""
