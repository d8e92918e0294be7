"""Routes about clients: registration, heartbeats and liveness, remote clients, the backup channel, data health."""
