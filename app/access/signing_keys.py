"""The public keys that an issuer signs its tokens with: fetched or read when they are needed first, and kept.

Fetching is bounded in time, bytes, keys and rate, one at a time, and follows no redirect. An issuer that does not
answer locks nobody out: the keys that were kept go on counting. A key that the issuer takes out of its set ends with
the next look, at the latest `SigningKeys.REFRESHED_SECONDS` and one request later.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from app.access.loopback import is_loopback
from app.domain.errors import Unavailable

logger = logging.getLogger(__name__)

FETCH_SECONDS: Final = 5.0
MAX_BYTES: Final = 256 * 1024
MAX_KEYS: Final = 100
MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 8192  # verification takes longer with the square of it
DISCOVERY_PATH: Final = "/.well-known/openid-configuration"
ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
"""Those with a public key. A shared secret would let the service, and whoever reads its settings, make tokens."""
# what a public key consists of: the private half of a set that was published by mistake is never read
_PUBLIC_MEMBERS: Final = frozenset({"kty", "kid", "alg", "n", "e", "crv", "x", "y"})
_KIND_BY_ALGORITHM: Final[Mapping[str, str]] = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}

Document = Callable[[], Awaitable[Any]]
"""Returns the document with the keys, or raises `KeysUnusable`."""
Jwk = Mapping[str, Any]


class KeysUnusable(Exception):
    """The keys could not be fetched or read; the text says why."""


class IssuerUnavailable(Unavailable):
    """No key of the issuer was ever fetched, so that no token of it can be checked."""

    code = "issuer_unavailable"


class SigningKeys:
    """The keys of one issuer, found by the id that a token names."""

    REFRESHED_SECONDS: Final = 600.0
    PAUSE_SECONDS: Final = 10.0
    """Between two looks, however many tokens name a key that nobody knows."""

    def __init__(self, issuer: str, document: Document, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._issuer = issuer
        self._document = document
        self._clock = clock
        self._keys: Sequence[Jwk] | None = None
        self._looked_at: float | None = None
        self._fetched_at = 0.0
        self._look: asyncio.Task[None] | None = None

    async def find(self, kid: str | None, algorithm: str) -> Jwk | None:
        """Return the one key with this id for this algorithm; None if there is none, or several fit a token without id.

        Raise `IssuerUnavailable` while no keys were ever fetched.
        """
        if self._keys is None:
            await self._refreshed()
        elif self._clock() - self._fetched_at >= self.REFRESHED_SECONDS:
            self._begin()  # nobody waits for it
        found = self._matching(kid, algorithm)
        if found is None:
            await self._refreshed()  # a new key, perhaps
            found = self._matching(kid, algorithm)
        if self._keys is None:
            raise IssuerUnavailable(issuer=self._issuer)
        return found

    def _matching(self, kid: str | None, algorithm: str) -> Jwk | None:
        kind = _KIND_BY_ALGORITHM.get(algorithm[:2])
        found = [
            key
            for key in self._keys or ()
            if kid in (None, key.get("kid")) and key["kty"] == kind and key.get("alg", algorithm) == algorithm
        ]
        return found[0] if len(found) == 1 else None

    async def _refreshed(self) -> None:
        """Wait for a look that is under way or may begin now."""
        look = self._begin()
        if look is not None:
            await asyncio.shield(look)  # others wait for it as well

    def _begin(self) -> asyncio.Task[None] | None:
        if self._look is not None and not self._look.done():
            return self._look
        if self._looked_at is not None and self._clock() - self._looked_at < self.PAUSE_SECONDS:
            return None
        self._looked_at = self._clock()
        self._look = asyncio.create_task(self._refresh())
        return self._look

    async def _refresh(self) -> None:
        try:
            keys = usable_keys(await self._document())
        except KeysUnusable as error:
            kept = len(self._keys or ())
            logger.warning(
                "signing_keys_not_refreshed", extra={"issuer": self._issuer, "problem": str(error), "kept": kept}
            )
            return
        if not keys:
            logger.warning("signing_keys_empty", extra={"issuer": self._issuer})
        self._keys, self._fetched_at = keys, self._clock()


def usable_keys(document: Any) -> Sequence[Jwk]:
    """Return the public halves of the keys that can verify signatures; raise `KeysUnusable` for what is no JWK set."""
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise KeysUnusable('it is no JWK set: a JSON object with a list "keys" is expected')
    if len(entries) > MAX_KEYS:
        raise KeysUnusable(f"it holds {len(entries)} keys; at most {MAX_KEYS} are taken")
    return [key for entry in entries if (key := _public(entry)) is not None]


def document_of(issuer: str, place: str) -> Document:
    """Return what gets the keys of an issuer from an address or a file; without a place from where the issuer says."""
    if not place:
        return _discovered(issuer)
    return _at(place) if is_safe_url(place) else _in_file(Path(place))


def is_safe_url(url: str) -> bool:
    """Say whether nobody between can change what comes from there: HTTPS, or this machine."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    if not parts.hostname or parts.username is not None:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))


def _in_file(file: Path) -> Document:
    def read() -> bytes:
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)

    async def load() -> Any:
        try:
            return _parsed(await asyncio.to_thread(read), str(file))
        except OSError as error:
            raise KeysUnusable(f"{file}: {error.strerror or error}") from error

    return load


def _at(url: str) -> Document:
    async def fetch() -> Any:
        return await _fetched(url)

    return fetch


def _discovered(issuer: str) -> Document:
    async def fetch() -> Any:
        url = issuer.rstrip("/") + DISCOVERY_PATH
        said = await _fetched(url)
        if not isinstance(said, dict) or said.get("issuer") != issuer:
            raise KeysUnusable(f"{url} is not about {issuer}")
        place = said.get("jwks_uri")
        if not isinstance(place, str) or not (is_safe_url(place) and (place.startswith("https:") or _is_local(issuer))):
            raise KeysUnusable(f"{url} names no address of keys that begins with https://")
        return await _fetched(place)

    return fetch


def _is_local(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")


async def _fetched(url: str) -> Any:
    """Return the JSON document at `url`."""
    import httpx  # few services have an issuer

    content = bytearray()
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}  # what is unpacked has no bound
    try:
        async with (
            asyncio.timeout(FETCH_SECONDS),
            httpx.AsyncClient(timeout=FETCH_SECONDS, trust_env=not _is_local(url)) as client,
            client.stream("GET", url, headers=headers, follow_redirects=False) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise KeysUnusable(f"{url} answers {response.status_code}")
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > MAX_BYTES:
                    break
    except TimeoutError:
        raise KeysUnusable(f"{url} does not answer within {FETCH_SECONDS:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise KeysUnusable(f"{url}: {type(error).__name__}: {error}") from error
    return _parsed(bytes(content), url)


def _parsed(content: bytes, place: str) -> Any:
    if len(content) > MAX_BYTES:
        raise KeysUnusable(f"{place} is larger than {MAX_BYTES} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise KeysUnusable(f"{place} is no JSON") from None


def _public(entry: Any) -> Jwk | None:
    """Return the public half of a key; None for one that verifies no signatures, or is too weak or too large."""
    import jwt  # few services have an issuer

    if not isinstance(entry, dict) or entry.get("kty") not in _KIND_BY_ALGORITHM.values():
        return None
    operations = entry.get("key_ops", ["verify"])
    if entry.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    public = {name: value for name, value in entry.items() if name in _PUBLIC_MEMBERS and value is not None}
    if not all(isinstance(value, str) for value in public.values()) or public.get("alg", "RS256") not in ALGORITHMS:
        return None
    try:
        key = jwt.PyJWK(public).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, NotImplementedError):
        return None
    is_sound = public["kty"] != "RSA" or MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS
    return public if is_sound else None
