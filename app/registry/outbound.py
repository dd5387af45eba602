"""Requests to servers whose address a user gave. They are bounded in time, and no proxy and no redirect is followed.

Importing it takes a tenth of a second: whoever calls servers rarely imports it then.
"""

import asyncio
import json
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import httpcore
import httpx

from app.presets.shared.helpers.deepe_addresses import AddressPolicy, AddressRefused, judged

_LONGEST_ANSWER: Final = 64 * 1024


class NoReply(Exception):
    """The server gives no answer; the message says why."""


@dataclass(frozen=True)
class Reply:
    """What a server answered; of its text the first 64 kB."""

    status: int
    text: str = ""


async def request(
    method: str, url: str, *, policy: AddressPolicy, seconds: float, document: Mapping[str, Any] | None = None
) -> Reply:
    """Send one request, with a JSON document or nothing; raise `NoReply`."""
    try:
        parts = httpx.URL(url)  # knows names that are not ASCII
        target = httpcore.URL(scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path)
        body = None if document is None else json.dumps(document).encode()
        headers = {} if document is None else {"content-type": "application/json"}
        async with (
            asyncio.timeout(seconds),
            httpcore.AsyncConnectionPool(ssl_context=tls(), network_backend=CheckedNetwork(policy)) as pool,
            pool.stream(method, target, headers=list(headers.items()), content=body) as response,
        ):
            text = await _beginning(response)
            return Reply(response.status, text)
    except TimeoutError as exc:
        raise NoReply(f"no answer within {seconds:.0f} s") from exc
    except (
        httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, httpx.InvalidURL, OSError,
    ) as exc:  # fmt: skip
        raise NoReply(str(exc).strip() or type(exc).__name__) from exc


@cache
def tls() -> ssl.SSLContext:
    """Return the settings of TLS; to read the system's certificates takes tens of milliseconds."""
    return ssl.create_default_context()


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were judged.

    The name is resolved once per connection and every address that it has is judged before one is connected to, so
    that a name cannot be judged by one address and reached under another.
    """

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
        except (OSError, UnicodeError) as error:
            problem = getattr(error, "strerror", None) or error
            raise httpcore.ConnectError(f"{host} cannot be resolved: {problem}") from error
        try:
            return judged(host, (str(entry[4][0]) for entry in found), self._policy)
        except AddressRefused as error:
            raise httpcore.ConnectError(str(error)) from error


async def _beginning(response: httpcore.Response) -> str:
    found = b""
    async for part in response.aiter_stream():
        found += part
        if len(found) >= _LONGEST_ANSWER:
            break
    return found[:_LONGEST_ANSWER].decode(errors="replace")
