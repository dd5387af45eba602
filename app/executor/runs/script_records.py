"""Log records as DeepExtension's helpers write them: one JSON object a line, in a file of the day in `logs`.

The backend, or what ships logs to it, finds there what happened to a task.
"""

import json
import logging
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from app.domain.enums import JobStatus
from app.domain.plain_text import shown, storable_document
from app.domain.texts import DEFAULT_LANGUAGE, text
from app.store.home import Home
from app.store.job_status import End
from app.store.tables import JobRow

logger = logging.getLogger(__name__)

MAX_REASON: Final = 500


class Record(IntEnum):
    """Codes of the records that a runner writes itself."""

    MISSING_PARAMETERS = 120001
    IGNORED_PARAMETERS = 120002
    STARTED = 120003
    SUCCEEDED = 120004
    FAILED = 120005
    FILE_MISSING = 130001
    PARAMETERS = 140001


_LEVELS = {
    Record.MISSING_PARAMETERS: "error",
    Record.IGNORED_PARAMETERS: "warning",
    Record.FAILED: "error",
    Record.FILE_MISSING: "error",
}


def write_records(logs: Path, *records: tuple[Record, str], task: Any, seq: Any) -> None:
    """Append the records of a task. Never raises: what cannot be written is logged. Blocks."""
    now = datetime.now(UTC)
    lines = [
        json.dumps(
            storable_document(
                {
                    "level": _LEVELS.get(code, "info"),
                    "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "taskUuid": task,
                    "seq": seq,
                    "msgDetail": text,
                    "msg": int(code),
                    "details": None,
                }
            )
        )
        for code, text in records
    ]
    # the date is the local one, as in the helpers
    file = logs / f"{now.astimezone():%Y-%m-%d}-deep-e-python.jsonl"
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in lines))
    except OSError as error:
        logger.warning("log_record_lost", extra={"task": str(task), "error": str(error)})


def write_end_record(home: Home, job: JobRow, end: End) -> None:
    """Append the record of the end of a job that a call of the backend made, where the runner writes one. Blocks."""
    call = job.launch.get("runner_call")
    if call is None or (label := call.get("label")) is None:
        return
    if end.status is JobStatus.SUCCEEDED:
        record = (Record.SUCCEEDED, label)
    else:
        reason = text(f"reason_{end.reason}", DEFAULT_LANGUAGE, **end.params)
        record = (Record.FAILED, f"{label},{shown(reason, limit=MAX_REASON)}")
    write_records(home.of(job.project_id).logs, record, task=call.get("status_key"), seq=call.get("seq"))
