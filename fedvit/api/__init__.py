"""The HTTP contract: request, response and problem models by subject, the transport of clients, and the checks of
incoming requests that all servers make; server and client import it.

What reads a database or a domain object of a higher package belongs into :mod:`serve_apps.control`.
"""
