"""The address that a request came from, also behind proxies: for the access log and the audit trail.

It is told and permits nothing: who is local, and whose network is trusted, is judged by the peer of the connection.
"""

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from starlette.datastructures import Headers

Address = IPv4Address | IPv6Address
Networks = Sequence[IPv4Network | IPv6Network]

MAX_HOPS: Final = 32
_WITH_PORT: Final = re.compile(r"\[(?P<v6>[0-9A-Fa-f:.]+)\](?::\d+)?|(?P<v4>[0-9.]+):\d+")
_FOR: Final = re.compile(r'(?:^|;)\s*for\s*=\s*("?)([^";,\s]*)\1\s*(?=;|$)', re.IGNORECASE)


def caller_address(peer: str | None, headers: Headers, proxies: Networks) -> str | None:
    """Return the address of the caller: of the peer, or, if that is one of the proxies, what they say.

    Each proxy adds the address that it was called from at the end, so the first from there that is none of the proxies
    is the caller: what stands before it was written by the caller. Where the proxies say nothing that can be read, or
    both headers and not the same in them, the last proxy is all that is known.
    """
    address = parsed(peer) if peer is not None else None
    if address is None or not _is_within(address, proxies):
        return peer
    found = {
        _before_proxies(hops, address, proxies)
        for hops in (_forwarded(headers.getlist("forwarded")), _listed(headers.getlist("x-forwarded-for")))
        if hops
    }
    return str(found.pop() if len(found) == 1 else address)


def parsed(text: str) -> Address | None:
    """Return an address as a proxy writes it, with or without a port; None if it is none."""
    match = _WITH_PORT.fullmatch(text)
    try:
        address = ip_address((match["v6"] or match["v4"]) if match else text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _before_proxies(hops: Sequence[str], last: Address, proxies: Networks) -> Address:
    for hop in reversed(hops[-MAX_HOPS:]):
        address = parsed(hop)
        if address is None:
            return last
        if not _is_within(address, proxies):
            return address
        last = address
    return last


def _is_within(address: Address, networks: Networks) -> bool:
    return any(address in network for network in networks)


def _listed(values: Sequence[str]) -> Sequence[str]:
    return [hop.strip() for value in values for hop in value.split(",")]


def _forwarded(values: Sequence[str]) -> Sequence[str]:
    """Return what each element of `Forwarded` (RFC 7239) calls `for`; empty where it says nothing."""
    elements = [element.strip() for value in values for element in value.split(",")]
    return [match[2] if (match := _FOR.search(element)) else "" for element in elements]
