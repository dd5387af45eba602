"""Why a stage failed: its exit and the end of its output become a typed reason with a detail.

Rules look at the exception that ended the script, not at everything it printed: an error that was caught and survived
is not the cause. Only when there is no such line are the last lines searched. Of a group of processes the one counts
that failed first: the others fail because it is gone.
"""

import json
import re
import signal as signals
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.domain.enums import EndReason
from app.domain.plain_text import storable, storable_document
from app.executor.engines.base import SUPERVISOR_TERMINATED, ExitRecord, ExitWhy
from app.executor.runs.log_file import collapse_carriage_returns

_MAX_DETAIL = 500
_LINES_SEARCHED = 40
_LAST_LINES = 5
LOG_DATA = "[log_data]:"
TRAINING_FAILED = 200006


@dataclass(frozen=True)
class Failure:
    """A typed reason, one line that shows it, and the values for the reason's text."""

    reason: EndReason
    detail: str
    params: Mapping[str, Any] = field(default_factory=dict)


def classify(exit_record: ExitRecord, log_tail: Sequence[str]) -> Failure:
    """Return why a stage that did not succeed ended, from its exit and the last lines of its output."""
    lines = _clean(log_tail)
    detail = last_words(lines)
    match exit_record.why:
        case ExitWhy.NEVER_STARTED | ExitWhy.SPAWN_FAILED:
            return _failure(EndReason.SPAWN_FAILED, exit_record.error or detail)
        case ExitWhy.REBOOT:
            return _failure(EndReason.NODE_LOST, detail)
        case ExitWhy.LOST:
            return _failure(EndReason.SUPERVISOR_LOST, detail)
        case ExitWhy.STOPPED:
            return _stopped(exit_record.stop_reason, detail)
    number = _signal_number(exit_record) or _signal_of_first_failure(log_tail)
    oom_kills = exit_record.oom_kills or 0
    # the kernel counted no kill for memory: the signal came from elsewhere
    not_for_memory = exit_record.oom_kills == 0
    if number == signals.SIGKILL and oom_kills:
        return _out_of_memory(exit_record, detail, probable=False)
    if recognised := recognise(lines):
        if recognised.reason is EndReason.OUT_OF_MEMORY and recognised.params["probable"] and not_for_memory:
            return _failure(EndReason.SIGNAL, recognised.detail, signal=_signal_name(signals.SIGKILL))
        if recognised.reason is EndReason.OUT_OF_MEMORY:
            certain = oom_kills > 0 or not recognised.params["probable"]
            return _out_of_memory(exit_record, recognised.detail, probable=not certain)
        return recognised
    # KILL of unknown origin, or a kill in the control group and a script that fell silent
    if (number == signals.SIGKILL and not not_for_memory) or (oom_kills and not _final_exceptions(lines)):
        return _out_of_memory(exit_record, detail, probable=True)
    if number is not None:
        return _failure(EndReason.SIGNAL, detail, signal=_signal_name(number))
    if exit_record.code is None:
        return _failure(EndReason.SUPERVISOR_LOST, detail)
    return _failure(EndReason.EXIT_CODE, detail or "(no output)", exit_code=exit_record.code)


def recognise(log_tail: Sequence[str]) -> Failure | None:
    """Return the cause that the output itself names; None if it names none that we know."""
    lines = _clean(log_tail)
    if exceptions := _final_exceptions(lines):
        return _first_match(exceptions, _ALL, lines)
    if found := _first_match(_reported_failures(lines), _ALL, lines):
        return found
    # libraries warn about optional modules at their start: only the very end may be believed there
    spoken = _spoken(lines)[::-1]
    near, far = spoken[:_LAST_LINES], spoken[:_LINES_SEARCHED]
    # a lost peer or a lost GPU comes last: what it was lost by was said before
    return _first_match(near, _RULES, lines) or _first_match(far, _SCARCITY, lines) or _first_match(far, _LOSSES, lines)


def _first_match(candidates: Sequence[str], rules: Sequence["_Rule"], lines: Sequence[str]) -> Failure | None:
    return next((found for line in candidates for rule in rules if (found := rule(line, lines))), None)


def last_words(log_tail: Sequence[str]) -> str:
    """Return the line that says best why a script ended: its exception, a reported failure, else its last line."""
    lines = _clean(log_tail)
    candidates = [*_final_exceptions(lines)[:1], *_reported_failures(lines), *reversed(_spoken(lines)[-1:])]
    return candidates[0][:_MAX_DETAIL] if candidates else ""


def _clean(log_tail: Sequence[str]) -> list[str]:
    return _of_first_failure([collapse_carriage_returns(line).strip("\r").rstrip() for line in log_tail])


# torchrun and accelerate put the rank before each line, and torch once more before those of an exception
_RANK = re.compile(r"^(?:\[(?:rank|default)(?P<rank>\d+)\]:\s?)+")
_OF_LAUNCHER = re.compile(r"torch[./]distributed[./]elastic[./]multiprocessing[./]api")
_FIRST_FAILURE = re.compile(r"^Root Cause \(first observed failure\)")
_FIELD = re.compile(r"^\s+(?P<name>rank|exitcode|traceback)\s*:\s*(?P<value>.*)$")
_CONSEQUENCES = re.compile(r"Connection (?:closed|reset) by peer|Broken pipe|DistBackendError|Timed out waiting")


def _of_first_failure(lines: Sequence[str]) -> list[str]:
    """Return the lines without marks of ranks; of a group that failed only what the first to fail wrote, and its end.

    The launcher's summary names it, but looks ten times a second: one that only lost its peer may have been seen first.
    """
    about = _about_first_failure(lines)
    if not about:
        return [_RANK.sub("", line) for line in lines]
    first = int(about.get("rank", "0").split()[0])
    of_rank = _by_rank(lines)
    if about.get("exitcode", "").startswith("-"):
        return [*of_rank.get(first, []), f"rank {first}: {about.get('traceback') or about['exitcode']}"]
    for rank in (first, *of_rank):
        exceptions = _final_exceptions(of_rank.get(rank, []))
        if exceptions and not _CONSEQUENCES.search(exceptions[0]):
            return of_rank[rank]
    return of_rank.get(first) or [f"rank {first}: exit code {about.get('exitcode', '?')}"]


def _about_first_failure(lines: Sequence[str]) -> dict[str, str]:
    """Return what the launcher's summary says of the process that failed first; empty if there is none."""
    begin = next((index for index, line in enumerate(lines) if _FIRST_FAILURE.match(line)), len(lines))
    matches = (_FIELD.match(line) for line in lines[begin:])
    return {match["name"]: match["value"].strip() for match in matches if match}


def _by_rank(lines: Sequence[str]) -> dict[int, list[str]]:
    """Return what each process wrote; rank 0 writes without a mark, until the launcher has the word."""
    of_rank: dict[int, list[str]] = {}
    launcher = False
    for line in lines:
        marked = _RANK.match(line)
        launcher = launcher or (marked is None and _OF_LAUNCHER.search(line) is not None)
        if marked or not launcher:
            of_rank.setdefault(int(marked["rank"]) if marked else 0, []).append(_RANK.sub("", line))
    return of_rank


def _signal_of_first_failure(log_tail: Sequence[str]) -> int | None:
    """Return the signal that ended the process of a group that failed first."""
    found = re.match(r"-(\d+)", _about_first_failure(log_tail).get("exitcode", ""))
    return int(found[1]) if found else None


_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit|Failure|Warning|Iteration|Abort)(?::|$)"
)
_LAUNCHERS = re.compile(r"ChildFailedError|^subprocess\.CalledProcessError: .*/bin/python")
_SUMMARIES = re.compile(r"ChildFailedError|CalledProcessError|RemoteTraceback|RemoteError|^SystemExit")
_CHAINED = re.compile(r"^(?:The above exception was the direct cause|During handling of the above exception)")


def _final_exceptions(lines: Sequence[str]) -> list[str]:
    """Return the exception that ended the script, and those it goes back to, nearest first; no launcher's summary."""
    found: list[str] = []
    linked = True
    for index in range(len(lines) - 1, -1, -1):
        line = lines[index]
        if _CHAINED.match(line):
            linked = True
        elif linked and _EXCEPTION.match(line) and _ends_traceback(lines, index):
            linked = bool(_SUMMARIES.search(line))
            if not _LAUNCHERS.search(line):
                found.append(_with_continuation(lines, index))
    return found


def _ends_traceback(lines: Sequence[str], index: int) -> bool:
    """Say whether the line stands right behind the indented frames of a traceback."""
    above = lines[index - 1] if index else ""
    return above.startswith((" ", "Traceback")) or bool(_SUMMARIES.search(lines[index]))


def _with_continuation(lines: Sequence[str], index: int) -> str:
    """Return the exception's line; a message that begins on the next line is joined to it."""
    line = lines[index]
    if line.endswith(":") and index + 1 < len(lines):
        return f"{line} {lines[index + 1].strip()}"
    return line


def _reported_failures(lines: Sequence[str]) -> list[str]:
    """Return the error texts that the script itself reported in a contract's form, newest first."""
    texts = []
    for line in reversed(lines):
        head, marker, rest = line.partition(LOG_DATA)
        if not marker and not head.lstrip().startswith("{"):
            continue
        try:
            document = json.loads(rest if marker else head)
        except (ValueError, RecursionError):
            continue
        if not isinstance(document, dict):
            continue
        if document.get("msg") == TRAINING_FAILED:
            texts.append(failure_text(document))
        elif str(document.get("status")).lower() in ("error", "failed", "failure"):
            texts.append(str(document.get("message") or document.get("error") or ""))
    return [text for text in texts if text]


def failure_text(record: Mapping[str, Any]) -> str:
    """Return the error text of a failure record. Some scripts put it into `taskUuid`, with `details` 0."""
    if record.get("details") == 0 and not isinstance(record.get("details"), bool):
        return str(record.get("taskUuid") or record.get("msgDetail") or "")
    return str(record.get("msgDetail") or "")


def _spoken(lines: Sequence[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip() and LOG_DATA not in line]


_Rule = Callable[[str, Sequence[str]], Failure | None]

_CUDA_MEMORY = re.compile(
    r"OutOfMemoryError|(?:CUDA|HIP|XPU|MPS)(?: backend)? out of memory|CUDA error: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
    r"|\[METAL\].*[Ii]nsufficient [Mm]emory|\[metal::malloc\]|\[malloc_or_wait\] Unable"
    r"|Cuda failure (?:\d+ )?'out of memory'",
)
_NCCL = re.compile(
    r"NCCL error in: |\bnccl(?:UnhandledCuda|System|Internal|Remote)Error\b|NCCL communicator (?:was )?aborted"
    r"|Watchdog caught collective operation timeout: WorkNCCL"
    r"|(?:NCCL|Process group) watchdog thread terminated with exception",
)
_METAL = re.compile(
    r"kIOGPUCommandBufferCallbackError(?:Timeout|Hang|ImpactingInteractivity|InnocentVictim)"
    r"|Caused GPU (?:Timeout|Hang) Error",
)
_HOST_MEMORY = re.compile(
    r"^MemoryError\b|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|\[malloc\] Unable to allocate"
)
_DISK = re.compile(r"No space left on device|Disk quota exceeded|\bENOSPC\b", re.IGNORECASE)
_MODULES = (
    re.compile(r"No module named ['\"]?(?P<name>[\w.]+)"),
    re.compile(r"(?:ImportError|PackageNotFoundError):.*`?pip3? install (?:-U |--upgrade )?['\"]?(?P<name>[\w.\-]+)"),
    re.compile(r"ImportError: .*requires the (?P<name>[\w.\-]+) library but it was not found"),
)
_COLUMNS = (
    re.compile(r"Column (?P<name>\S+) (?:not in the dataset|doesn't exist)"),
    re.compile(r"Column (?:name |to \w+ )?\[['\"](?P<name>[^'\"]+)['\"].* not in the dataset"),
    re.compile(
        r"(?:[Mm]issing (?:required )?columns?|[Nn]o columns?(?: named)?)[: ]+\[?['\"`](?P<name>[^'\"`]+)['\"`]"
    ),
    re.compile(r"[Cc]olumns? \[?['\"`](?P<name>[^'\"`]+)['\"`]\]? (?:is|are|was|were)? ?(?:missing|not found)"),
)
_KEY = re.compile(r"^KeyError: ['\"](?P<name>.+)['\"]$")
_ROW = re.compile(r"\b(?:row|rows|example|examples|sample|samples|item|items|record|batch|x|d)\[['\"]")
_KILLED = re.compile(r"killed by signal: Killed|Signal 9 \(SIGKILL\)|exitcode\s*: -9")


def _cuda_memory(line: str, _: Sequence[str]) -> Failure | None:
    return _failure(EndReason.CUDA_OUT_OF_MEMORY, line) if _CUDA_MEMORY.search(line) else None


def _host_memory(line: str, _: Sequence[str]) -> Failure | None:
    return _failure(EndReason.OUT_OF_MEMORY, line, probable=False) if _HOST_MEMORY.search(line) else None


def _disk(line: str, _: Sequence[str]) -> Failure | None:
    return _failure(EndReason.DISK_FULL, line) if _DISK.search(line) else None


def _killed(line: str, _: Sequence[str]) -> Failure | None:
    return _failure(EndReason.OUT_OF_MEMORY, line, probable=True) if _KILLED.search(line) else None


def _module(line: str, _: Sequence[str]) -> Failure | None:
    for pattern in _MODULES:
        if match := pattern.search(line):
            return _failure(EndReason.MODULE_MISSING, line, module=match["name"].strip(".").split(".")[0])
    return None


def _column(line: str, lines: Sequence[str]) -> Failure | None:
    for pattern in _COLUMNS:
        if match := pattern.search(line):
            return _failure(EndReason.COLUMN_MISSING, line, column=match["name"].strip("'\"`[]"))
    if (match := _KEY.match(line)) and _reads_a_row(match["name"], lines):
        return _failure(EndReason.COLUMN_MISSING, line, column=match["name"])
    return None


def _reads_a_row(name: str, lines: Sequence[str]) -> bool:
    """Say whether a missing key was a field of a row: the exception names the key only, the frames tell."""
    return any(
        "datasets/formatting/" in line or (_ROW.search(line) and (f'["{name}"]' in line or f"['{name}']" in line))
        for line in lines
    )


def _nccl(line: str, lines: Sequence[str]) -> Failure | None:
    """Processes that lost each other; the library says on another line when it was for memory."""
    if not _NCCL.search(line):
        return None
    memory = next((other for other in lines if "Cuda failure" in other and _CUDA_MEMORY.search(other)), None)
    return _failure(EndReason.NCCL_ERROR, line) if memory is None else _failure(EndReason.CUDA_OUT_OF_MEMORY, memory)


def _metal(line: str, _: Sequence[str]) -> Failure | None:
    return _failure(EndReason.METAL_WATCHDOG, line) if _METAL.search(line) else None


_SCARCITY: tuple[_Rule, ...] = (_cuda_memory, _disk, _host_memory, _killed)
_RULES: tuple[_Rule, ...] = (*_SCARCITY, _module, _column)
_LOSSES: tuple[_Rule, ...] = (_nccl, _metal)
_ALL: tuple[_Rule, ...] = (*_RULES, *_LOSSES)


def _stopped(stop_reason: str | None, detail: str) -> Failure:
    """Return how a stage ended that was asked to."""
    if stop_reason == SUPERVISOR_TERMINATED:
        # not by us: a person or the system sent TERM to the stage's supervisor
        return _failure(EndReason.SIGNAL, detail, signal="SIGTERM")
    if stop_reason in (EndReason.TIMED_OUT, EndReason.STALLED):
        return _failure(EndReason(stop_reason), detail)
    return _failure(EndReason.CANCELLED, detail)


def _signal_number(exit_record: ExitRecord) -> int | None:
    """Return the signal that ended the script; a shell in between reports it as code 128 + n."""
    if exit_record.signal is not None:
        return exit_record.signal
    deadly = {signals.SIGABRT, signals.SIGBUS, signals.SIGFPE, signals.SIGILL, signals.SIGKILL, signals.SIGSEGV}
    code = exit_record.code or 0
    return code - 128 if code - 128 in {*deadly, signals.SIGTERM} else None


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _out_of_memory(exit_record: ExitRecord, detail: str, *, probable: bool) -> Failure:
    return _failure(
        EndReason.OUT_OF_MEMORY, detail, probable=probable, signal="SIGKILL", max_rss_bytes=exit_record.max_rss_bytes
    )


def _failure(reason: EndReason, detail: str, **params: Any) -> Failure:
    detail = storable(detail[:_MAX_DETAIL])
    return Failure(reason=reason, detail=detail, params={"detail": detail, **storable_document(params)})
