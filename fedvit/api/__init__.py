"""The HTTP contract: request, response and problem models by subject, and the transport; server and client import it.

What reads a database or a domain object of a higher package belongs into :mod:`serve_apps.control`.
"""
