"""Trouble of the database or the machine: met with patience, told in one line."""

import logging
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

# Not the fault of the job that met it first; everything else is a fault of the service.
TROUBLE: Final = (SQLAlchemyError, OSError)

_FIRST_REST_SECONDS = 0.5
_LONGEST_REST_SECONDS = 10.0  # a node that slept through the end of an outage would take no jobs for longer


def rest_seconds(failures: int) -> float:
    """Return how long to wait after so many failures in a row."""
    return min(_FIRST_REST_SECONDS * 2.0 ** min(failures - 1, 10), _LONGEST_REST_SECONDS)


def log_trouble(logger: logging.Logger, event: str, error: Exception, fields: dict[str, object]) -> None:
    """Log expected trouble as a line, anything else with its traceback."""
    if isinstance(error, TROUBLE):
        words = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
        logger.warning(event, extra=fields | {"error": words})
    else:
        logger.error(event, extra=fields, exc_info=error)
