"""What every route of the control API shares: authorization, bodies, idempotency, audit, caching, OpenAPI links."""
