"""One message to one address: bounded in time, answered by a status and nothing else, never led elsewhere.

The name is resolved once per connection and every address that it has is looked at before one is connected to, so that
a name cannot be checked with one address and reached under another. Redirects are answers like others: nothing is
followed. No proxy is used.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

import httpcore

from app.domain.webhooks import POST_SECONDS, AddressPolicy, Answer, is_refused

_USER_AGENT = "DeepExtension-Webhooks/1"


class AddressRefused(httpcore.ConnectError):
    """The name leads to an address that nothing may be sent to."""


class WebhookClient:
    """Posts messages; connections are kept for a while."""

    def __init__(self, *, policy: AddressPolicy, seconds: float = POST_SECONDS) -> None:
        self._seconds = seconds
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=_tls(),
            max_connections=None,
            max_keepalive_connections=16,
            keepalive_expiry=30,
            network_backend=_CheckedNetwork(policy),
        )

    async def post(self, url: str, *, headers: Mapping[str, str], body: bytes) -> Answer:
        """Return what came of it; never raises for what a receiver or the network does."""
        sent = {"content-type": "application/json", "user-agent": _USER_AGENT, **headers}
        try:
            async with (
                asyncio.timeout(self._seconds),
                self._pool.stream("POST", url, headers=list(sent.items()), content=body) as response,
            ):
                return _answer(response)  # the body of the answer is not read
        except TimeoutError:
            return Answer(status=None, error=f"no answer within {self._seconds:g} s")
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            return Answer(status=None, error=_words(error))

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()


@cache
def _tls() -> ssl.SSLContext:
    """Return the settings of TLS; to read the system's certificates takes tens of milliseconds."""
    return ssl.create_default_context()


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were looked at."""

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy = policy
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        problem: Exception | None = None
        for address in await self._addresses(host, port):
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError as error:
                problem = error
        raise problem or httpcore.ConnectError(f"{host} has no address")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved: {error.strerror or error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if is_refused(ipaddress.ip_address(address.partition("%")[0]), self._policy):
                raise AddressRefused(f"{host} leads to {address}, where nothing may be sent")
        return addresses


def _answer(response: httpcore.Response) -> Answer:
    if 200 <= response.status < 300:
        return Answer(status=response.status)
    headers = {name.lower(): value for name, value in response.headers}
    redirected = " (redirects are not followed)" if 300 <= response.status < 400 else ""
    return Answer(
        status=response.status,
        error=f"HTTP {response.status}{redirected}",
        retry_after=_retry_after(headers.get(b"retry-after", b"").decode("latin-1").strip()),
    )


def _retry_after(text: str) -> timedelta | None:
    """Return what the header says: seconds, or a date."""
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return timedelta(seconds=int(text))
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return max(moment.astimezone(UTC) - datetime.now(UTC), timedelta())


def _words(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__)[:500]
