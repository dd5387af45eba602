"""Which ports can be listened on."""

import socket

LAST_PORT = 65535


def is_free(host: str, port: int) -> bool:
    """Say whether a server could listen on `host:port` now."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # as servers do: a port whose old connections are still closing is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    # macOS lets us bind 127.0.0.1 beside somebody who listens on every address
    with socket.socket(family, kind, protocol) as caller:
        caller.settimeout(0.5)
        return caller.connect_ex(address) != 0


def next_free(host: str, port: int) -> int:
    """Return the first free port from `port` on, or one that the system chooses."""
    for candidate in range(port, min(port + 100, LAST_PORT + 1)):
        if is_free(host, candidate):
            return candidate
    return any_free(host)


def any_free(host: str) -> int:
    """Return a free port that the system chooses."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)
        port: int = probe.getsockname()[1]
        return port
