"""Log records of a stage. Standard library only, so that a script's first words and refusals come at once.

A record goes to stdout (`[log_data]: <json>`), to the day's file in `../logs`, and its metrics to `$DEEPE_EVENTS`.
"""

import argparse
import json
import math
import sys
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import deepe
from enums import LevelEnum, LogEnum

_LOG_FILE = Path("..", "logs", f"{datetime.now().astimezone():%Y-%m-%d}-deep-e-python.jsonl")


def write_log(level: Any, logEnum: Any, details: Any, train_id: Any, seq: Any, external_data: Any) -> None:
    """Write one record. Mind the names: `details` becomes `msgDetail`, `external_data` becomes `details`."""
    write_record(level, logEnum, details, train_id, seq, external_data)
    if _value(logEnum) == LogEnum.Training.value and isinstance(external_data, dict):
        report(external_data, step_of(external_data), None)


def write_record(level: Any, code: Any, message: Any, train_id: Any, seq: Any, details: Any) -> None:
    """Write one record to the output and, as the first of a group, to the file of the day."""
    record = {
        "level": str(getattr(level, "name", level)).lower(),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "taskUuid": train_id,
        "seq": seq,
        "msgDetail": message,
        "msg": _value(code),
        "details": details,
    }
    line = json.dumps(_finite(record), default=str)
    sys.stdout.write(f"[log_data]: {line}\n")
    sys.stdout.flush()
    if not deepe.is_first():  # of a group of processes one writes the file; what the others print carries their rank
        return
    try:
        with _LOG_FILE.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        sys.stdout.write(f"Write Error: {error}\n")


def log(code: str, message: str, args: argparse.Namespace, *, level: str = "INFO") -> None:
    """Write a record of a stage; in a group of processes only the first one speaks."""
    if not deepe.is_first():
        return
    write_log(LevelEnum[level], LogEnum[code], message, args.train_id, args.seq, None)


def remark(sentence: str, args: argparse.Namespace, *, warning: bool = True) -> None:
    """Tell the user about a choice or a loss that is worth knowing."""
    if deepe.is_first():
        deepe.note(sentence)
        log("ParamCheckWarning", sentence, args, level="WARNING" if warning else "INFO")


def remark_plan(rows: int, sequences: int, steps: int, args: argparse.Namespace) -> None:
    """Tell what becomes of the rows that are learned."""
    remark(f"{rows} rows -> {sequences} sequences -> {steps} steps", args, warning=False)


def report(values: dict[str, Any], step: int, total: int | None) -> None:
    """Tell the platform the numbers among the values, and the progress if the number of steps is known."""
    numbers = {key: value for key, value in values.items() if key != "step" and _is_number(value)}
    if numbers:
        deepe.metrics(step, **numbers)
    if total is not None:
        deepe.progress(step, total)


def step_of(values: dict[str, Any], key: str = "step") -> int:
    """Return the step that is named among the values, 0 if none is."""
    step = values.get(key, 0)
    return int(step) if _is_number(step) and math.isfinite(step) else 0


def _value(code: Any) -> Any:
    return code.value if isinstance(code, Enum) else code


def _is_number(value: Any) -> bool:
    return hasattr(value, "item") or (isinstance(value, int | float) and not isinstance(value, bool))


def _finite(value: Any) -> Any:
    """Return `value` with NaN and infinity as null, so that every line is JSON that any reader takes."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_finite(entry) for entry in value]
        case _ if hasattr(value, "item"):
            return _finite(value.item())
        case _:
            return value
