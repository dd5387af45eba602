"""One message to one address: bounded in time, answered by a status and nothing else, never led elsewhere.

Connections go to addresses that were judged (`app.registry.outbound`). Redirects are answers like others: nothing is
followed. No proxy is used.
"""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpcore

from app.domain.webhooks import POST_SECONDS, Answer
from app.presets.shared.helpers.deepe_addresses import AddressPolicy
from app.registry.outbound import CheckedNetwork, tls

_USER_AGENT = "DeepExtension-Webhooks/1"


class WebhookClient:
    """Posts messages; connections are kept for a while."""

    def __init__(self, *, policy: AddressPolicy, seconds: float = POST_SECONDS) -> None:
        self._seconds = seconds
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls(),
            max_connections=None,
            max_keepalive_connections=16,
            keepalive_expiry=30,
            network_backend=CheckedNetwork(policy),
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
