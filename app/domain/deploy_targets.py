"""Deploy targets as values: the kinds of serving tools, the addresses and the settings that they may have."""

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from app.domain.enums import JobKind
from app.domain.errors import Violation
from app.domain.plain_text import shown
from app.domain.pointers import pointer
from app.domain.rendering import filled_arguments

MAX_URL_LENGTH = 2000
MAX_SETTINGS = 100
MAX_SETTINGS_LENGTH = 10_000
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}")


class DeployTargetKind(StrEnum):
    """Serving tool behind a configured deploy target."""

    OLLAMA = "ollama"
    CUSTOM = "custom"
    """A server that a script of the user's deploys to: the method's, or the target's own."""


def normal_url(url: str) -> str:
    """Return the address as it is kept: without a slash at its end."""
    return url.strip().rstrip("/")


def url_violations(url: str) -> list[Violation]:
    """Return what is wrong with the address of a serving tool."""
    url = normal_url(url)
    if not url.isprintable() or " " in url or len(url) > MAX_URL_LENGTH:
        return [Violation("/url", "invalid_url")]
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or 1 <= parts.port <= 65535
    except ValueError:
        return [Violation("/url", "invalid_url")]
    if parts.username is not None or parts.password is not None:
        # it would stand in every job, log and list
        return [Violation("/url", "url_with_credentials")]
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port_fits or parts.query or parts.fragment:
        return [Violation("/url", "invalid_url")]
    return []


def with_port(url: str, port: int | None) -> str:
    """Return the address with the port that was given beside it; an address with a port keeps its own."""
    try:
        parts = urlsplit(url.strip())
        if port is None or not parts.hostname or parts.port is not None:
            return url
    except ValueError:
        return url
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{port}"))


def without_port(url: str) -> str:
    """Return the address without its port."""
    parts = urlsplit(url)
    if parts.port is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition(":")[0]))


def port_violations(url: str, port: int | None) -> list[Violation]:
    """Return what is wrong with a port that was given beside the address."""
    if port is None or url_violations(url):
        return []
    own = urlsplit(normal_url(url)).port
    return [] if own in (None, port) else [Violation("/port", "port_named_twice", {"url": shown(url), "port": port})]


def settings_violations(settings: Mapping[str, Any]) -> list[Violation]:
    """Return what is wrong with the settings of a target: each becomes an argument of the deployment's script."""
    reserved = filled_arguments(JobKind.DEPLOYMENT)
    found = [Violation(pointer("settings", name), "setting_reserved") for name in settings if name in reserved]
    found += [
        Violation(pointer("settings", name), "invalid_setting_name")
        for name in settings
        if not _SETTING.fullmatch(name)
    ]
    if len(settings) > MAX_SETTINGS or len(json.dumps(settings)) > MAX_SETTINGS_LENGTH:
        found.append(Violation("/settings", "settings_too_long", {"limit": MAX_SETTINGS_LENGTH}))
    return found
