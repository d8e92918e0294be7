"""Secure aggregation: state machines of client and server, and distributed noise in integers.

The server learns the sum of the clients' vectors, and nothing else about them (SecAgg+, Bell et al. 2020, eprint
2020/704). The modules are pure: they neither wait nor store anything.
"""
