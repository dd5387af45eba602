"""Transient errors of the database or the machine: backed off from, logged in one line."""

import logging
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

# Not the fault of the job that met it first. Any other exception is a defect of the service.
TRANSIENT: Final = (SQLAlchemyError, OSError)

_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 10.0  # a node that slept through the end of an outage would take no jobs for longer


def backoff_seconds(failures: int) -> float:
    """Return the pause after so many failures in a row: exponential, bounded."""
    return min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10), _LONGEST_BACKOFF_SECONDS)


def log_failure(logger: logging.Logger, event: str, error: Exception, fields: dict[str, object]) -> None:
    """Log a transient error as one line, any other with its traceback."""
    if isinstance(error, TRANSIENT):
        words = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
        logger.warning(event, extra=fields | {"error": words})
    else:
        logger.error(event, extra=fields, exc_info=error)
