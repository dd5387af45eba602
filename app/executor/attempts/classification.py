"""Why a stage failed: its exit and the end of its output become a typed reason with a detail.

Rules look at the exception that ended the script, not at everything it printed: an error that was caught and survived
is not the cause. Only when there is no such line are the last lines searched. `last_words` says which lines count.
"""

import re
import signal as signals
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.domain.enums import EndReason
from app.domain.plain_text import storable, storable_document
from app.executor.attempts.last_words import Ending, ending_of, signal_of_first_failure
from app.executor.engines.base import SUPERVISOR_TERMINATED, ExitRecord, ExitWhy

_MAX_DETAIL = 500
_LINES_SEARCHED = 40
_LAST_LINES = 5


@dataclass(frozen=True)
class Failure:
    """A typed reason, one line that shows it, and the values for the reason's text."""

    reason: EndReason
    detail: str
    params: Mapping[str, Any] = field(default_factory=dict)


def classify(exit_record: ExitRecord, log_tail: Sequence[str]) -> Failure:
    """Return why a stage that did not succeed ended, from its exit and the last lines of its output."""
    ending = _believed(ending_of(log_tail))
    detail = _last_words(ending)
    match exit_record.why:
        case ExitWhy.NEVER_STARTED | ExitWhy.SPAWN_FAILED:
            return _failure(EndReason.SPAWN_FAILED, exit_record.error or detail)
        case ExitWhy.REBOOT:
            return _failure(EndReason.NODE_LOST, detail)
        case ExitWhy.LOST:
            return _failure(EndReason.SUPERVISOR_LOST, detail)
        case ExitWhy.STOPPED:
            return _stopped(exit_record.stop_reason, detail)
    number = _signal_number(exit_record) or signal_of_first_failure(log_tail)
    oom_kills = exit_record.oom_kills or 0
    # the kernel counted no kill for memory: the signal came from elsewhere
    not_for_memory = exit_record.oom_kills == 0
    if number == signals.SIGKILL and oom_kills:
        return _out_of_memory(exit_record, detail, probable=False)
    if recognised := _recognise(ending):
        if recognised.reason is EndReason.OUT_OF_MEMORY and recognised.params["probable"] and not_for_memory:
            return _failure(EndReason.SIGNAL, recognised.detail, signal=_signal_name(signals.SIGKILL))
        if recognised.reason is EndReason.OUT_OF_MEMORY:
            certain = oom_kills > 0 or not recognised.params["probable"]
            return _out_of_memory(exit_record, recognised.detail, probable=not certain)
        return recognised
    # KILL of unknown origin, or a kill in the control group and a script that fell silent
    if (number == signals.SIGKILL and not not_for_memory) or (oom_kills and not ending.exceptions):
        return _out_of_memory(exit_record, detail, probable=True)
    if number is not None:
        return _failure(EndReason.SIGNAL, detail, signal=_signal_name(number))
    if exit_record.code is None:
        return _failure(EndReason.SUPERVISOR_LOST, detail)
    return _failure(EndReason.EXIT_CODE, detail or "(no output)", exit_code=exit_record.code)


def recognise(log_tail: Sequence[str]) -> Failure | None:
    """Return the cause that the output itself names; None if it names none that we know."""
    return _recognise(_believed(ending_of(log_tail)))


def _recognise(ending: Ending) -> Failure | None:
    lines = ending.lines
    if ending.exceptions:
        return _first_match(ending.exceptions, _ALL, lines)
    if found := _first_match(ending.reported, _ALL, lines):
        return found
    near, far = ending.spoken[:_LAST_LINES], ending.spoken[:_LINES_SEARCHED]
    return (
        _first_match(near, _SCARCITY, lines)
        # libraries warn about optional modules, and scripts go on without them: only the last word may be believed
        or _first_match(near[:1], _RULES, lines)
        # a lost peer or a lost GPU comes last: what it was lost by was said before
        or _first_match(far, _SCARCITY, lines)
        or _first_match(far, _LOSSES, lines)
    )


def _first_match(candidates: Sequence[str], rules: Sequence["_Rule"], lines: Sequence[str]) -> Failure | None:
    return next((found for line in candidates for rule in rules if (found := rule(line, lines))), None)


def last_words(log_tail: Sequence[str]) -> str:
    """Return the line that says best why a script ended: its exception, a reported failure, else its last line."""
    return _last_words(_believed(ending_of(log_tail)))


def words_of_exception(log_tail: Sequence[str]) -> str:
    """Return the exception that ends the output, or the failure that was reported there; empty if there is neither."""
    ending = _believed(ending_of(log_tail))
    return next(iter([*_shown_exception(ending), *ending.reported]), "")[:_MAX_DETAIL]


def _last_words(ending: Ending) -> str:
    return next(iter([*_shown_exception(ending), *ending.reported, *ending.spoken[:1]]), "")[:_MAX_DETAIL]


def _shown_exception(ending: Ending) -> Sequence[str]:
    if ending.exceptions and ending.behind:
        # a message of several lines, or an exception that was survived: both ends are shown
        return (f"{ending.exceptions[0][: _MAX_DETAIL // 2]} … {ending.behind[-1]}",)
    return ending.exceptions[:1]


def _believed(ending: Ending) -> Ending:
    """Return the ending without exceptions that were survived.

    Messages of the causes that we know are one line long: with anything behind it, the exception was not the end.
    """
    survived = ending.behind and _first_match(ending.exceptions, _ALL, ending.lines)
    return ending.without_exceptions() if survived else ending


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
_BESIDE = re.compile(
    r"(?:No such file or directory|Permission denied|Read-only file system|Not a directory|does not exist|not found)"
    r".*/versions/[0-9a-f]{2}/[0-9a-f]{64}/home[^/]*/scripts/(?P<name>[^'\"]+)"
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


def _beside(line: str, _: Sequence[str]) -> Failure | None:
    """A file beside the script that its version does not pin; the tree that runs is read-only."""
    match = _BESIDE.search(line)
    return _failure(EndReason.FILE_NOT_PINNED, line, file=match["name"]) if match else None


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
_RULES: tuple[_Rule, ...] = (*_SCARCITY, _beside, _module, _column)
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
