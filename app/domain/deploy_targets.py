"""Deploy targets as values: the kinds of serving tools, and the addresses they may have."""

from enum import StrEnum
from urllib.parse import urlsplit

from app.domain.errors import Violation

MAX_URL_LENGTH = 2000


class DeployTargetKind(StrEnum):
    """Serving tool behind a configured deploy target; `custom` is none: its method brings file and environment."""

    OLLAMA = "ollama"


def normal_url(url: str) -> str:
    """Return the address as it is kept: without a slash at its end."""
    return url.strip().rstrip("/")


def url_violations(url: str, pointer: str = "/url") -> list[Violation]:
    """Return what is wrong with the address of a serving tool."""
    url = normal_url(url)
    if not url.isprintable() or " " in url or len(url) > MAX_URL_LENGTH:
        return [Violation(pointer, "invalid_url")]
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or 1 <= parts.port <= 65535
    except ValueError:
        return [Violation(pointer, "invalid_url")]
    if parts.username is not None or parts.password is not None:
        # it would stand in every job, log and list
        return [Violation(pointer, "url_with_credentials")]
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port_fits or parts.query or parts.fragment:
        return [Violation(pointer, "invalid_url")]
    return []
