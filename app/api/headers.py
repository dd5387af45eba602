"""Header names and dependencies that several routes share."""

from typing import Annotated, Final

from fastapi import Header

IF_MATCH: Final = "If-Match"
IF_NONE_MATCH: Final = "If-None-Match"
IDEMPOTENCY_KEY: Final = "Idempotency-Key"
IDEMPOTENCY_REPLAYED: Final = "Idempotency-Replayed"
LAST_EVENT_ID: Final = "Last-Event-ID"

LastEventId = Annotated[
    str | None,
    Header(
        alias=LAST_EVENT_ID,
        max_length=200,
        description="`id` of the last event that was read; the stream goes on after it. Browsers send it.",
    ),
]
