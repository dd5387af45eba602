"""Which addresses may be called where a user named one, and connections to none but those. Standard library only.

The API (webhooks, deploy targets) and the platform's own stage scripts (deployment, download) go by the same rules. A
name is resolved once, every address that it has is judged, and the connection goes to one of the judged addresses: a
name that resolves differently a moment later gains nothing. A redirect is a connection like another.

A server behind a proxy of the environment is resolved by that proxy; what is judged here is the proxy's address.
"""

import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import urllib.request
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

POLICY = "DEEPE_TARGET_ADDRESSES"
"""Variable that tells a stage script the policy for servers that a user names."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# where clouds hand machines their credentials, beside the link-local ranges
_METADATA: Final = frozenset(
    ipaddress.ip_address(text) for text in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
)
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_TRANSLATED = ipaddress.IPv6Network("::ffff:0:0:0/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
# interface identifiers of ISATAP, before the IPv4 address
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)


class AddressPolicy(StrEnum):
    """Which addresses may be called."""

    ANY = "any"
    """All but those of metadata services and those that are no machine's."""
    PUBLIC = "public"


class AddressRefused(OSError):
    """Nothing may be sent to an address that a name leads to."""


def is_refused(address: Address, policy: AddressPolicy) -> bool:
    """Say whether nothing may be sent there: no machine, a cloud's metadata service, or against the policy.

    An IPv6 address that carries an IPv4 address is judged as what it is and as what it carries.
    """
    carried: list[Address] = list(_carried(address))
    if any(_is_never_called(one) for one in (address, *carried)):
        return True
    if policy is AddressPolicy.ANY:
        return False
    if address in _LOCAL_NAT64 or address in _COMPATIBLE:
        return True  # the network of somebody's own, and a form that nobody assigns
    return not all(one.is_global for one in carried or [address])


def literal(host: str) -> Address | None:
    """Return the address that a host is written as, in each form that a resolver takes; None for a name.

    `2130706433`, `0x7f.1` and `0177.0.0.1` are 127.0.0.1.
    """
    bare = host.strip("[]").partition("%")[0]
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(bare)
    with contextlib.suppress(OSError, ValueError):
        return ipaddress.IPv4Address(socket.inet_aton(bare.rstrip(".")))
    return None


def refused_literal(url: str, policy: AddressPolicy) -> Address | None:
    """Return the address in a URL if nothing may be sent there. A name is judged when it is connected to."""
    address = literal(urlsplit(url).hostname or "")
    return address if address is not None and is_refused(address, policy) else None


def judged(host: str, found: Iterable[str], policy: AddressPolicy) -> list[str]:
    """Return the addresses of a host, each once; raise `AddressRefused` if one of them may not be called."""
    addresses = list(dict.fromkeys(found))
    for address in addresses:
        if is_refused(ipaddress.ip_address(address.partition("%")[0]), policy):
            raise AddressRefused(f"{host} leads to {address}, where nothing may be sent")
    return addresses


def opener(policy: AddressPolicy | None = None, *handlers: Any) -> urllib.request.OpenerDirector:
    """Return an opener of http and https addresses that connects to judged addresses only, redirects included.

    Without a policy it is that of the job: what `DEEPE_TARGET_ADDRESSES` says.
    """
    chosen = policy or AddressPolicy(os.environ.get(POLICY) or AddressPolicy.ANY)
    found = urllib.request.OpenerDirector()
    for handler in (
        *handlers, urllib.request.ProxyHandler(), _Http(chosen), _Https(chosen), urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):  # fmt: skip
        found.add_handler(handler)
    return found


def _carried(address: Address) -> Iterator[ipaddress.IPv4Address]:
    """Yield the IPv4 addresses that an IPv6 address may be on its way to."""
    if isinstance(address, ipaddress.IPv4Address):
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    number = int(address)
    last = ipaddress.IPv4Address(number & 0xFFFF_FFFF)
    if (
        address in _NAT64
        or address in _TRANSLATED
        or (address in _COMPATIBLE and number > 0xFFFF)  # `::` and `::1` are IPv6's own
        or (number >> 32) & 0xFFFF_FFFF in _ISATAP
    ):
        yield last
    if address in _LOCAL_NAT64:
        # RFC 6052: behind 48, 56 or 64 bits, around the eight bits 64 to 71, or at the end
        places = (
            (number >> 64 & 0xFFFF) << 16 | number >> 40 & 0xFFFF,
            (number >> 64 & 0xFF) << 24 | number >> 32 & 0xFF_FFFF,
            number >> 24 & 0xFFFF_FFFF,
            int(last),
        )
        # only one of them is meant; the others are mostly zeros
        yield from (one for one in map(ipaddress.IPv4Address, places) if one not in _THIS_NETWORK)


def _is_never_called(address: Address) -> bool:
    return (
        address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address in _METADATA
        or (isinstance(address, ipaddress.IPv4Address) and address in _THIS_NETWORK)
    )


def _connected(
    policy: AddressPolicy, target: tuple[str, int], timeout: float | None = None, source: Any = None
) -> socket.socket:
    """Connect like `socket.create_connection`, to addresses that were judged."""
    host, port = target
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    problem: OSError = OSError(f"{host} has no address")
    for address in judged(host, (str(entry[4][0]) for entry in found), policy):
        try:
            return socket.create_connection((address, port), timeout, source)
        except OSError as error:
            problem = error
    raise problem


def _judged_connection(kind: Any, policy: AddressPolicy, *args: Any, **named: Any) -> http.client.HTTPConnection:
    """Make a connection of `http.client` that connects to judged addresses, through a proxy as well."""
    connection: http.client.HTTPConnection = kind(*args, **named)
    connection._create_connection = partial(_connected, policy)  # type: ignore[attr-defined]
    return connection


class _Http(urllib.request.HTTPHandler):
    def __init__(self, policy: AddressPolicy) -> None:
        super().__init__()
        self._make: Any = partial(_judged_connection, http.client.HTTPConnection, policy)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._make, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, policy: AddressPolicy) -> None:
        super().__init__()
        self._make: Any = partial(_judged_connection, http.client.HTTPSConnection, policy)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._make, req, context=ssl.create_default_context())
