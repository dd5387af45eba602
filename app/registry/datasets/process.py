"""Reads data sets in processes of their own, which are stopped when they meet a limit.

A short text is read at once: it can take no time and no memory worth a process. Everything else goes to a child that
bounds its own memory, processor time and files, and that the parent ends after some time on the clock. The child ends
by itself when the parent does. Libraries of formats are imported by children only.
"""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from app.domain.errors import Conflict, Violation
from app.domain.plain_text import shown
from app.formats.base import Limits, Options
from app.registry.datasets.check import Column, DatasetReport
from app.registry.datasets.conversion import Task, is_small_text, read_dataset, scratch_prefix
from app.registry.datasets.files import DatasetChanging, Inspection, locate, remove, require_regular

MIB: Final = 1024 * 1024
_SMALL: Final = MIB
_ROOT: Final = Path(__file__).parents[3]
_START: Final = """
import sys
sys.path.insert(0, sys.argv[1])
from app.registry.datasets.process import answer
answer()
"""
# what the interpreter itself may need in order to start
_INHERITED: Final = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "LANG", "LC_ALL")
_OUT_OF_MEMORY: Final = 71
_FILE_TOO_LARGE: Final = 72


class DatasetUnprocessed(Conflict):
    """The disk or the machine failed while the file was read."""

    code = "dataset_unprocessed"


@dataclass(frozen=True)
class ProcessLimits:
    """What reading one data set may take."""

    seconds: float = 1800
    """On the clock and of processor time."""
    memory_bytes: int = 2048 * MIB
    processes: int = 2
    """How many data sets are read at once; others wait."""


class BoundedDatasetReader:
    """Reads data sets within limits. Threads may share it; `read` blocks for as long as the limits allow."""

    def __init__(self, *, row_characters: int, output_bytes: int, limits: ProcessLimits | None = None) -> None:
        self.limits = limits or ProcessLimits()
        self._row_characters = row_characters
        self._output_bytes = output_bytes
        self._slots = threading.BoundedSemaphore(self.limits.processes)

    def read(
        self, path: Path, options: Options | None = None, *, keep: bool = True, extract_to: Path | None = None
    ) -> Inspection:
        """Check and convert the data set at `path`. What is wrong with its rows is in the report."""
        limits = Limits(
            row_characters=self._row_characters,
            output_bytes=self._output_bytes,
            memory_bytes=self.limits.memory_bytes,
        )
        require_regular(locate(path).rows)
        task = Task(path, limits, options or Options(), keep=keep, extract_to=extract_to)
        try:
            if is_small_text(path, task.options, max_bytes=_SMALL):
                return read_dataset(task)
            with self._slots:
                return self._in_a_child(task)
        except OSError as error:
            raise DatasetUnprocessed(path=shown(path.name), problem=error.strerror or str(error)) from error

    def _in_a_child(self, task: Task) -> Inspection:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, str(_ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **{name: os.environ[name] for name in _INHERITED if name in os.environ},
                "ARROW_DEFAULT_MEMORY_POOL": "system",
                "OMP_NUM_THREADS": "1",
            },
            start_new_session=True,  # Ctrl-C of a terminal is not for it
        )
        assert child.stdin is not None
        assert child.stdout is not None
        timer = threading.Timer(self.limits.seconds, child.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                request = {"task": _written(task), "limits": asdict(self.limits)}
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()  # it stays open: its end tells the child that the parent is gone
            answer = child.stdout.read()
        finally:
            timer.cancel()
            child.kill()
            code = child.wait()
            child.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        if answer.endswith(b"\n"):
            return _inspection(task, json.loads(answer))
        return self._stopped(task, child.pid, code)

    def _stopped(self, task: Task, pid: int, code: int) -> Inspection:
        rows = locate(task.path).rows
        for left in rows.parent.glob(f"{scratch_prefix(pid)}*"):
            remove(left)
        match code:
            case code if code == _OUT_OF_MEMORY:
                problem = Violation("/file", "reading_memory", {"limit": self.limits.memory_bytes // MIB})
            case code if code == _FILE_TOO_LARGE:
                problem = Violation("/file", "reading_output", {"limit": self._output_bytes // MIB})
            case code if code in (-9, -24):  # killed by the timer; SIGXCPU
                problem = Violation("/file", "reading_time", {"limit": round(self.limits.seconds)})
            case _:
                problem = Violation("/file", "reading_crashed", {"code": code})
        return Inspection(rows, "", 0, DatasetReport(0, (), (problem,), 1), ())


def answer() -> None:
    """Read the data set that the parent asks for, within the limits that it gives. Runs in the child."""
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    limits, task = request["limits"], _task(request["task"])
    # a platform that has no such limit (macOS) is left with those of time
    for kind, amount in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, int(limits["seconds"]) + 1),
        (resource.RLIMIT_FSIZE, task.limits.output_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (amount, amount))
    try:
        document = _document(read_dataset(task))
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except DatasetChanging:
        document = {"changing": True}
    except OSError as error:
        if error.errno == errno.EFBIG:
            os._exit(_FILE_TOO_LARGE)
        document = {"failed": error.strerror or str(error)}
    sys.stdout.buffer.write(json.dumps(document).encode() + b"\n")
    sys.stdout.buffer.flush()
    os._exit(0)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


# ---- across the pipe ------------------------------------------------------------------------------------------------


def _written(task: Task) -> dict[str, Any]:
    return {
        "path": str(task.path),
        "limits": asdict(task.limits),
        "options": asdict(task.options),
        "keep": task.keep,
        "extract_to": None if task.extract_to is None else str(task.extract_to),
    }


def _task(document: Mapping[str, Any]) -> Task:
    return Task(
        path=Path(document["path"]),
        limits=Limits(**document["limits"]),
        options=Options(**document["options"]),
        keep=document["keep"],
        extract_to=None if document["extract_to"] is None else Path(document["extract_to"]),
    )


def _document(found: Inspection) -> dict[str, Any]:
    return {**asdict(found), "jsonl": str(found.jsonl)}


def _inspection(task: Task, document: dict[str, Any]) -> Inspection:
    if "changing" in document:
        raise DatasetChanging(path=shown(task.path.name))
    if "failed" in document:
        raise DatasetUnprocessed(path=shown(task.path.name), problem=document["failed"])
    report = document.pop("report")
    columns = tuple(Column(**column) for column in report.pop("columns"))
    problems = tuple(Violation(**problem) for problem in report.pop("problems"))
    return Inspection(
        **{
            **document,
            "jsonl": Path(document["jsonl"]),
            "key": tuple(document["key"]),
            "report": DatasetReport(columns=columns, problems=problems, **report),
        }
    )
