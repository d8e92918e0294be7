"""Model versions and releases: the publisher on the server, and the client that fetches and verifies them."""
