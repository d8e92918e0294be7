"""Who may do what: scopes, tokens, OIDC, limits, and where it is safe to listen."""
