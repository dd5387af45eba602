"""Which names and addresses can be reached from this machine only."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Say whether `host` (a name or address without port) is this machine and nothing else."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
