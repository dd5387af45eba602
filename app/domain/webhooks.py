"""Webhooks as values: their events, the form of addresses, signatures, and the delays between tries.

Messages follow the open specification Standard Webhooks (`webhook-id`, `webhook-timestamp`, `webhook-signature`).
"""

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final
from urllib.parse import urlsplit

from app.domain.enums import JobKind, JobStatus
from app.domain.errors import Violation
from app.domain.kinds import KINDS

MAX_URL_LENGTH: Final = 2000
SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what every secret begins with
MAX_TRIES: Final = 12
POST_SECONDS: Final = 15.0

_SECRET_BYTES = 32
_FIRST_DELAY = timedelta(seconds=5)
_LONGEST_DELAY = timedelta(hours=4)
_LONGEST_REQUESTED = timedelta(days=1)
_MIN_SECRET_BYTES, _MAX_SECRET_BYTES = 24, 64


class WebhookEvent(StrEnum):
    """Events a webhook can subscribe to. `job`: training, saving, deployment; the others must be named."""

    JOB_STARTED = "job.started"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    QUESTION_SUCCEEDED = "question.succeeded"
    QUESTION_FAILED = "question.failed"
    QUESTION_CANCELLED = "question.cancelled"
    ENVIRONMENT_SUCCEEDED = "environment.succeeded"
    ENVIRONMENT_FAILED = "environment.failed"
    ENVIRONMENT_CANCELLED = "environment.cancelled"
    BASE_MODEL_SUCCEEDED = "base-model.succeeded"
    BASE_MODEL_FAILED = "base-model.failed"
    BASE_MODEL_CANCELLED = "base-model.cancelled"


DEFAULT_EVENTS: Final = (WebhookEvent.JOB_SUCCEEDED, WebhookEvent.JOB_FAILED, WebhookEvent.JOB_CANCELLED)
TEST_EVENT: Final = "webhook.test"

_WORDS: Final[Mapping[JobStatus, str]] = {
    JobStatus.RUNNING: "started",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "cancelled",
}
PUBLISHED_STATUSES: Final = frozenset(_WORDS)
"""Statuses whose transitions are published to webhooks."""


def event_of(kind: JobKind, status: JobStatus) -> WebhookEvent | None:
    """Return the event of the transition to `status`; None if webhooks cannot subscribe to it."""
    name = f"{KINDS[kind].event_subject}.{_WORDS.get(status)}"
    return WebhookEvent(name) if name in set(WebhookEvent) else None


@dataclass(frozen=True)
class Answer:
    """What a receiver said; without a status why it said nothing."""

    status: int | None
    error: str | None = None
    retry_after: timedelta | None = None


# ---- addresses ------------------------------------------------------------------------------------------------------


def normal_url(url: str) -> str:
    """Return the address as it is kept."""
    return url.strip()


def url_violations(url: str) -> list[Violation]:
    """Return what is wrong with the form of a receiver's address."""
    url = normal_url(url)
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url or len(url) > MAX_URL_LENGTH:
        return [Violation("/url", "invalid_webhook_url")]
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or 1 <= parts.port <= 65535
    except ValueError:
        return [Violation("/url", "invalid_webhook_url")]
    if parts.username is not None or parts.password is not None:
        return [Violation("/url", "url_with_credentials")]
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port_fits or parts.fragment:
        return [Violation("/url", "invalid_webhook_url")]
    return []


# ---- signature ------------------------------------------------------------------------------------------------------


def new_secret() -> str:
    """Return a new key to sign with."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def secret_violations(secret: str) -> list[Violation]:
    """Return what is wrong with a key that a caller chose."""
    try:
        size = len(_key(secret))
    except (ValueError, binascii.Error):
        size = 0
    if not secret.startswith(SECRET_PREFIX) or not _MIN_SECRET_BYTES <= size <= _MAX_SECRET_BYTES:
        limits = {"least": _MIN_SECRET_BYTES, "most": _MAX_SECRET_BYTES}
        return [Violation("/secret", "invalid_webhook_secret", limits)]
    return []


def body_bytes(body: Mapping[str, Any]) -> bytes:
    """Return the message as it is sent; the same bytes at every try."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def signed_headers(secret: str, *, message: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers that prove where the message comes from and when it was sent."""
    content = f"{message}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(_key(secret), content, hashlib.sha256).digest()).decode()
    return {"webhook-id": message, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)


# ---- tries ----------------------------------------------------------------------------------------------------------


def next_delay(tries: int, *, chance: float, requested: timedelta | None = None) -> timedelta | None:
    """Return how long to wait after so many failed tries; None: give up, after about a day.

    `chance` (0 to 1) spreads messages that failed together. `requested` is the delay in `Retry-After`.
    """
    if tries >= MAX_TRIES:
        return None
    grown: timedelta = _FIRST_DELAY * float(4 ** (tries - 1))
    delay = min(grown, _LONGEST_DELAY) * (0.8 + 0.4 * chance)
    return delay if requested is None else max(delay, min(requested, _LONGEST_REQUESTED))
