"""What the end of an output says of a failure: which lines count, and which only stand behind the cause.

The last thing that happened counts, no matter who printed it. A traceback is the cause only if it ends the output: what
wrappers, launchers and libraries print behind every failure is looked past, and a script that went on after an
exception has survived it. Of a group of processes the one counts that failed first: the others fail because it is gone.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from app.executor.runs.log_file import collapse_carriage_returns

LOG_DATA = "[log_data]:"
TRAINING_FAILED = 200006

# a message of several lines is seldom longer; who prints more has gone on
_LONGEST_MESSAGE = 10
# wrappers mark which stream they repeat
_WRAPPED = re.compile(r"^(?:\[(?:(?P<error>ERR|STDERR)|OUT|STDOUT)\]|(?:(?P<stderr>STDERR|stderr)|STDOUT|stdout):) ?")
_BEHIND = re.compile(
    r"^(?:"
    r"(?:return|exit)[ _-]?(?:code|status)\s*[:=]?\s*-?\d+\W*$"
    r"|Process finished with exit code|Command .* returned non-zero exit status|make: \*\*\*"
    r"|\[[^\]]*\] \[(?:INFO|ERROR|WARNING)\] \[launch\.py:"  # DeepSpeed's launcher
    r"|\[?[EWI]\d{4}[ :]|[=\-*~^]{3,}$|wandb: "
    r"|terminate called after throwing|Aborted|Segmentation fault"
    r"|(?:\S+: )?(?:UserWarning: )?resource_tracker: |\S+resource_tracker\.py:\d+: "
    r"|CUDA kernel errors might be|For debugging consider passing CUDA_LAUNCH|Compile with `?TORCH_USE_CUDA_DSA"
    r"|nccl\w+Error: |Last error:|Cuda failure "
    r"|```|`?pip3? install |Please note that you may need to restart|Set the environment variable HYDRA_FULL_ERROR"
    r")"
)
_BAR = re.compile(r"\d%\|")
_METRICS = re.compile(r"^\{['\"][\w/]*loss['\"]: ")
_IGNORED = re.compile(r"^Exception ignored (?:in|while|on)\b")
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit|Failure|Warning|Iteration|Abort)(?::|$)"
)
_LAUNCHERS = re.compile(r"ChildFailedError|^subprocess\.CalledProcessError: .*/bin/python")
_SUMMARIES = re.compile(r"ChildFailedError|CalledProcessError|RemoteTraceback|RemoteError|^SystemExit")
_CHAINED = re.compile(r"^(?:The above exception was the direct cause|During handling of the above exception)")
_TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ending:
    """The end of an output.

    `exceptions`: the one that ended the script, and those it goes back to, nearest first. `behind`: lines that follow
    it and may belong to its message; whether the script survived it cannot be told by them alone. `reported`: failures
    that the script itself reported, newest first. `spoken`: everything else that was said, newest first, without
    tracebacks that were survived. `lines`: all of it.
    """

    exceptions: tuple[str, ...]
    behind: tuple[str, ...]
    reported: tuple[str, ...]
    spoken: tuple[str, ...]
    lines: tuple[str, ...]

    def without_exceptions(self) -> "Ending":
        """Return the ending of a script that survived its last exception."""
        return Ending((), (), self.reported, self.spoken, self.lines)


def ending_of(log_tail: Sequence[str]) -> Ending:
    """Return what the last lines of an output say."""
    lines = _clean(log_tail)
    found = _exceptions(lines)
    behind = _behind(lines, found.last) if found.texts else ()
    survived = len(behind) > _LONGEST_MESSAGE or any(_METRICS.match(line) for line in behind)
    return Ending(
        exceptions=() if survived else tuple(found.texts),
        behind=() if survived else behind,
        reported=tuple(_reported_failures(lines)),
        spoken=tuple(_spoken(lines)),
        lines=tuple(lines),
    )


def failure_text(record: Mapping[str, object]) -> str:
    """Return the error text of a failure record. Some scripts put it into `taskUuid`, with `details` 0."""
    if record.get("details") == 0 and not isinstance(record.get("details"), bool):
        return str(record.get("taskUuid") or record.get("msgDetail") or "")
    return str(record.get("msgDetail") or "")


def _clean(log_tail: Sequence[str]) -> list[str]:
    lines = [collapse_carriage_returns(line).strip("\r").rstrip() for line in log_tail]
    return _without_ignored(_of_first_failure(_unwrapped(lines)))


def _unwrapped(lines: Sequence[str]) -> list[str]:
    """Return the lines without a wrapper's marks.

    A wrapper reads both streams at once, so an exception may stand before what was printed earlier: it comes last here.
    """
    marked = [(_WRAPPED.match(line), line) for line in lines]
    plain = [(mark, line[mark.end() :] if mark else line) for mark, line in marked]
    if any(_is_error(mark) and _EXCEPTION.match(line) for mark, line in plain):
        plain.sort(key=lambda one: one[0] is None or _is_error(one[0]))
    return [line for _, line in plain]


def _is_error(mark: re.Match[str] | None) -> bool:
    return mark is not None and mark.lastgroup is not None


def _without_ignored(lines: Sequence[str]) -> list[str]:
    """Leave out the tracebacks that the interpreter prints at its end of exceptions that cannot be caught."""
    kept: list[str] = []
    ignoring = False
    for line in lines:
        if _IGNORED.match(line):
            ignoring = True
        elif not ignoring:
            kept.append(line)
        elif not line.startswith((" ", _TRACEBACK)):
            ignoring = False  # the exception itself
            if not _EXCEPTION.match(line):
                kept.append(line)
    return kept


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
        exceptions = _exceptions(of_rank.get(rank, [])).texts
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


def signal_of_first_failure(log_tail: Sequence[str]) -> int | None:
    """Return the signal that ended the process of a group that failed first."""
    found = re.match(r"-(\d+)", _about_first_failure(log_tail).get("exitcode", ""))
    return int(found[1]) if found else None


@dataclass(frozen=True)
class _Exceptions:
    """Texts of exceptions, nearest to the end first, and the index of the first one's line."""

    texts: Sequence[str] = ()
    last: int = 0


def _exceptions(lines: Sequence[str]) -> _Exceptions:
    """Return the last exception and those it goes back to; no launcher's summary."""
    found: list[str] = []
    last = 0
    linked = True
    for index in range(len(lines) - 1, -1, -1):
        line = lines[index]
        if _CHAINED.match(line):
            linked = True
        elif linked and _EXCEPTION.match(line) and _ends_traceback(lines, index):
            linked = bool(_SUMMARIES.search(line))
            if not _LAUNCHERS.search(line):
                last = last if found else index
                found.append(_with_continuation(lines, index))
    return _Exceptions(found, last)


def _behind(lines: Sequence[str], index: int) -> tuple[str, ...]:
    """Return the lines behind an exception that stand at the margin and are not printed behind every failure."""
    rest: list[str] = []
    follows_head = lines[index].endswith(":")  # the message begins on the next line
    for line in lines[index + 1 :]:
        if line.startswith(_TRACEBACK) or _FIRST_FAILURE.match(line):
            break  # a launcher's summary
        is_message = line.startswith((" ", "\t")) or follows_head
        follows_head = line.startswith("Last error:")
        if line and not is_message and not _is_noise(line):
            rest.append(line)
    return tuple(rest)


def _is_noise(line: str) -> bool:
    return LOG_DATA in line or _BEHIND.match(line) is not None or _BAR.search(line) is not None


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


def _spoken(lines: Sequence[str]) -> list[str]:
    """Return what was said outside of tracebacks, newest first; noise only if that is all."""
    spoken = [line.strip() for line in _outside_tracebacks(lines) if line.strip() and LOG_DATA not in line][::-1]
    return [line for line in spoken if not _BEHIND.match(line)] or spoken


def _outside_tracebacks(lines: Sequence[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        if line.startswith(_TRACEBACK):
            inside = True
        elif not inside:
            yield line
        elif not line.startswith(" "):
            inside = False  # the exception itself
