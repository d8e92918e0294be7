"""Access control: identities, scopes, tokens, OIDC, rate limits, and checks of the bind address."""
