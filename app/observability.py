"""Structured logs: standard logging, one event name a record, the rest as fields.

`logger.info("job_claimed", extra={"job_id": job_id})`. Fields that hold for a whole request or job are set once with
`log_context(...)` and appear on every record written inside. Console form for people, JSON lines for machines.
"""

import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final, TextIO

from app.domain.plain_text import printable

ACCESS_LOGGER: Final = "app.access_log"

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_context: ContextVar[Mapping[str, Any]] = ContextVar("log_context", default=MappingProxyType({}))

_STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
_LEVEL_COLOURS = {"DEBUG": "\x1b[2m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31;1m"}
_RESET, _DIM, _BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
# their own lines say what our events say, or too much
_QUIET = {
    "uvicorn.access": logging.CRITICAL,
    "alembic": logging.WARNING,
    "arq": logging.WARNING,
    "httpcore": logging.WARNING,
    "httpx": logging.WARNING,
}


@contextmanager
def log_context(**fields: Any) -> Iterator[None]:
    """Add `fields` to every record written inside the block, tasks started there included."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def configure_logging(*, level: str = "info", form: str = "auto", stream: TextIO | None = None) -> None:
    """Send all logs (uvicorn's too) to `stream` (stderr) as `console` or `json`; `auto` looks for a terminal.

    Start uvicorn with `log_config=None, access_log=False`: the requests are logged by our own middleware.
    """
    stream = stream or sys.stderr
    terminal = stream.isatty()
    as_json = form == "json" or (form == "auto" and not terminal)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json else ConsoleFormatter(colours=terminal))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name, least in _QUIET.items():
        logging.getLogger(name).setLevel(max(least, root.level))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `event`, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        # default=str: a log call never fails on an odd value; ASCII output survives every terminal and surrogate
        return json.dumps(line, default=str, ensure_ascii=True)


class ConsoleFormatter(logging.Formatter):
    """`12:00:01 info  job_claimed  job_id=... node=...` for people."""

    def __init__(self, *, colours: bool = False) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        fields = printable(" ".join(f"{key}={_console_value(value)}" for key, value in _fields(record).items()))
        level = self._paint(f"{record.levelname.lower():<7}", _LEVEL_COLOURS.get(record.levelname, ""))
        time = self._paint(_time(record).astimezone().strftime("%H:%M:%S"), _DIM)
        line = f"{time} {level} {self._paint(printable(record.getMessage()), _BOLD)}"
        if fields:
            line += f"  {self._paint(fields, _DIM)}"
        if record.exc_info:
            line += "\n" + printable("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return line

    def _paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}{_RESET}" if self._colours and colour else text


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    current = request_id.get()
    if current is not None:
        fields["request_id"] = current
    fields |= _context.get()
    fields |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD_FIELDS}
    return fields


def _console_value(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c.isspace() or c == '"' for c in text) else text
