"""A port for a process that a test starts."""

import secrets
import socket


def free_port() -> int:
    """A port that nobody listens at.

    It lies below the range from which the system takes the port of an outgoing connection: a port of
    that range may be taken before the process that the test starts has come as far as listening.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
