"""Reads scripts in processes of their own, which are stopped when they meet a limit.

A process is started when it is first needed and kept for the next script; it is replaced after it met a limit, crashed
or read much. Results are remembered by the digest of the source, that of a script that met a limit too. Several who
ask for the same script at once wait for one reading.

A script may take arguments from modules that stand beside it. Where they are is known to the caller, who hands over a
function that finds them; a reading that names more is repeated with them.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.argspec.child import (
    CHECK,
    CPU_TIME_SIGNAL,
    DIFFERENCE,
    HEADER,
    INPUTS,
    LENGTH,
    OUT_OF_MEMORY,
    READ,
    RISKS,
    TOO_MUCH_OUTPUT,
)
from app.argspec.differences import Difference, packed_pair
from app.argspec.inputs import Inputs, Named, Variable, Word
from app.argspec.modules import MAX_BYTES, MAX_MODULES, Source, packed
from app.argspec.report import (
    Arguments,
    ExclusiveGroup,
    Imports,
    Option,
    OptionClass,
    ParserClass,
    Positional,
    Remark,
    SyntaxProblem,
)
from app.argspec.risks import Risk, Risks

logger = logging.getLogger(__name__)

MIB = 1024 * 1024
ModuleFinder = Callable[[str], Source | None]
"""Returns the source of a module beside a script, by its dotted name; `None` if there is none."""
Limit = Literal["cpu_time", "wall_time", "memory", "output", "crash"]

_ROOT = Path(__file__).parents[2]
_START = """
import sys
sys.path.insert(0, sys.argv[1])
from app.argspec.child import serve
serve(cpu_seconds=float(sys.argv[2]), memory_bytes=int(sys.argv[3]), output_bytes=int(sys.argv[4]))
"""
# what the interpreter itself may need in order to start
_INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")
_REMARKS: Mapping[Limit, str] = {
    "cpu_time": "unread_cpu_time",
    "wall_time": "unread_wall_time",
    "memory": "unread_memory",
    "output": "unread_output",
    "crash": "unread_crash",
}
_READS_BYTES = 4 * MIB  # of source, in a process's life: what it holds on to stays small beside the memory limit
_REMEMBERED_BYTES = 64 * MIB


@dataclass(frozen=True)
class Limits:
    """What reading one script may take."""

    cpu_seconds: float = 5
    wall_seconds: float = 30
    """Ends a process that waits for something, or that a busy machine keeps from running."""
    memory_bytes: int = 512 * MIB
    output_bytes: int = MIB
    processes: int = 2
    """How many scripts are read at once; others wait."""

    def amount(self, limit: Limit) -> str:
        """Return the limit as a person reads it."""
        match limit:
            case "cpu_time":
                return f"{self.cpu_seconds:g} s"
            case "wall_time":
                return f"{self.wall_seconds:g} s"
            case "memory":
                return f"{self.memory_bytes // MIB} MiB"
            case "output":
                return f"{self.output_bytes // 1024} KiB"
            case "crash":
                return ""


@dataclass(frozen=True)
class Stopped:
    """The limit that a reading met."""

    limit: Limit
    amount: str


@dataclass(frozen=True)
class Reading:
    """What was read of a script."""

    problem: SyntaxProblem | None = None
    """Why the source is not Python."""
    imports: Imports = field(default_factory=Imports)
    arguments: Arguments = field(default_factory=Arguments)
    """With a remark under `unread` if the source is not Python or a limit was met."""
    inputs: Inputs = field(default_factory=Inputs)
    """Read by `inputs` alone."""
    risks: Risks = field(default_factory=Risks)
    """Read by `risks` alone."""
    difference: Difference = field(default_factory=Difference)
    """Read by `difference` alone."""
    wanted: Sequence[str] = ()
    """Modules that would have been followed if their sources had been there."""
    stopped: Stopped | None = None
    """The limit that was met; nothing is known of the script then, not even whether it is Python."""

    @property
    def lasting(self) -> bool:
        """Whether the same source would be read the same way again; a busy or failing machine is no such thing."""
        return self.stopped is None or self.stopped.limit not in ("wall_time", "crash")


class BoundedReader:
    """Reads scripts within limits. Threads may share it; all methods block for as long as the limits allow."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._slots = threading.BoundedSemaphore(self.limits.processes)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._results: OrderedDict[tuple[bytes, str], Future[tuple[Reading, int]]] = OrderedDict()
        self._remembered = 0

    @property
    def idle(self) -> int:
        """Return how many processes wait for work."""
        with self._lock:
            return len(self._idle)

    def check(self, source: bytes) -> Reading:
        """Say whether `source` is Python, and what it imports; its arguments are not read."""
        return self._remembered_or(CHECK, source)

    def inputs(self, source: bytes) -> Inputs:
        """Return what the script reads besides its options; nothing if it is not Python or met a limit."""
        return self._remembered_or(INPUTS, source).inputs

    def risks(self, source: bytes) -> Reading:
        """Return what a reviewer of the script should look at."""
        return self._remembered_or(RISKS, source)

    def difference(self, before: bytes, after: bytes) -> Reading:
        """Return the difference of two files; two that are too different meet a limit."""
        return self._remembered_or(DIFFERENCE, packed_pair(before, after))

    def read(self, source: bytes, find: ModuleFinder = lambda _: None, *, package: str = "") -> Reading:
        """Return what the script says, with the modules that `find` finds beside it.

        `package` is that of a module which is run as `python -m`: its relative imports start there.
        """
        modules: dict[str, Source | None] = {}
        while True:
            reading = self._remembered_or(READ, packed(source, modules, package))
            found = {name: find(name) for name in reading.wanted}
            modules |= found
            if not any(found.values()) or not _is_bounded(modules):
                return reading

    def close(self) -> None:
        """End the processes that wait for work; a later call starts new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def _remembered_or(self, kind: bytes, source: bytes) -> Reading:
        key = (kind, hashlib.sha256(source).hexdigest())
        with self._lock:
            result = self._results.get(key)
            mine = result is None
            if result is None:
                result = self._results[key] = Future()
            else:
                self._results.move_to_end(key)
        if mine:
            try:
                reading, weight = self._ask(kind, source)
            except BaseException as error:
                with self._lock:
                    del self._results[key]
                result.set_exception(error)
                raise
            result.set_result((reading, weight))
            self._remember(key, reading, weight)
        return result.result()[0]

    def _remember(self, key: tuple[bytes, str], reading: Reading, weight: int) -> None:
        with self._lock:
            if not reading.lasting:
                del self._results[key]
                return
            self._remembered += weight
            for key, result in list(self._results.items()):
                if self._remembered <= _REMEMBERED_BYTES:
                    return
                if result.done():
                    self._remembered -= result.result()[1]
                    del self._results[key]

    def _ask(self, kind: bytes, source: bytes) -> tuple[Reading, int]:
        """Return the reading and how much it weighs."""
        with self._slots:
            child = self._child()
            answer = child.ask(kind, source, wall_seconds=self.limits.wall_seconds)
            if child.reusable:
                with self._lock:
                    self._idle.append(child)
            else:
                child.end()
        if isinstance(answer, bytes):
            return _reading(json.loads(answer)), len(answer) + 1024
        stopped = Stopped(answer, self.limits.amount(answer))
        logger.warning("script_reading_stopped", extra={"limit": answer, "size": len(source)})
        remark = Remark(code=_REMARKS[answer], line=1, subject=stopped.amount)
        return Reading(arguments=Arguments(unread=(remark,)), stopped=stopped), 1024

    def _child(self) -> "_Child":
        while True:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            if child is None:
                return _Child(self.limits)
            if child.alive:
                return child
            child.end()


class _Child:
    """One process, used by one thread at a time."""

    def __init__(self, limits: Limits) -> None:
        self._output_bytes = limits.output_bytes
        numbers = (limits.cpu_seconds, limits.memory_bytes, limits.output_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, str(_ROOT), *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _INHERITED if name in os.environ},
            start_new_session=True,  # Ctrl-C of a terminal is not for it
        )
        self._to_read = _READS_BYTES
        self.reusable = True

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, kind: bytes, source: bytes, *, wall_seconds: float) -> bytes | Limit:
        """Return the answer, or the limit that was met instead."""
        deadline = _Deadline(wall_seconds, self._process.kill)
        try:
            answer = self._exchange(kind, source)
        except (OSError, EOFError):
            answer = None
        in_time = deadline.stop()
        self._to_read -= len(source)
        self.reusable = answer is not None and in_time and self._to_read > 0
        if answer is not None and in_time:
            return answer
        return self._limit() if in_time else "wall_time"

    def end(self) -> None:
        """End the process and wait for its end."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()

    def _exchange(self, kind: bytes, source: bytes) -> bytes:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(HEADER.pack(kind, len(source)) + source)
        requests.flush()
        header = answers.read(LENGTH.size)
        if len(header) < LENGTH.size:
            raise EOFError
        (length,) = LENGTH.unpack(header)
        answer = answers.read(length) if length <= self._output_bytes else b""
        if len(answer) < length:
            raise EOFError
        return answer

    def _limit(self) -> Limit:
        match self._process.wait():
            case code if code == -CPU_TIME_SIGNAL:
                return "cpu_time"
            case code if code == OUT_OF_MEMORY:
                return "memory"
            case code if code == TOO_MUCH_OUTPUT:
                return "output"
            case _:
                return "crash"


class _Deadline:
    """Calls a function after some time, unless it is stopped before."""

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._open = True
        self._in_time = True
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> bool:
        """Return whether it was stopped in time."""
        self._timer.cancel()
        with self._lock:
            self._open = False
            return self._in_time

    def _expire(self) -> None:
        with self._lock:
            if self._open:
                self._in_time = False
                self._function()


@functools.cache
def shared_reader() -> BoundedReader:
    """Return the reader that all of this process shares, so that its processes are few."""
    reader = BoundedReader()
    atexit.register(reader.close)
    return reader


def _is_bounded(modules: Mapping[str, Source | None]) -> bool:
    """Whether the modules of one script are few and small enough to be read with it."""
    sources = [source for source in modules.values() if source is not None]
    return len(sources) <= MAX_MODULES and sum(len(source.content) for source in sources) <= MAX_BYTES


def _reading(document: Mapping[str, Any]) -> Reading:
    if "problem" in document:
        problem = SyntaxProblem(**document["problem"])
        remark = Remark(code="unread_not_python", line=problem.line, subject=problem.message)
        return Reading(problem=problem, arguments=Arguments(unread=(remark,)))
    if "inputs" in document:
        return Reading(inputs=_inputs(document["inputs"]))
    if "risks" in document:
        risks = document["risks"]
        return Reading(risks=Risks([Risk(**one) for one in risks["found"]], risks["more"]))
    if "difference" in document:
        return Reading(difference=Difference(**document["difference"]))
    imports = Imports(**document["imports"])
    if "arguments" not in document:
        return Reading(imports=imports)
    return Reading(
        imports=imports,
        arguments=_arguments(document["arguments"]),
        wanted=document["wanted"],
    )


def _inputs(document: Mapping[str, Any]) -> Inputs:
    return Inputs(
        variables=[Variable(**one) for one in document["variables"]],
        words=[Word(**one) for one in document["words"]],
        named=[Named(**one) for one in document["named"]],
    )


def _arguments(document: Mapping[str, Any]) -> Arguments:
    return Arguments(
        options=[Option(**option) for option in document["options"]],
        positionals=[Positional(**positional) for positional in document["positionals"]],
        exclusive=[ExclusiveGroup(**group) for group in document["exclusive"]],
        accepts_unknown=document["accepts_unknown"],
        abbreviates=document["abbreviates"],
        unread=[Remark(**remark) for remark in document["unread"]],
        notes=[Remark(**remark) for remark in document["notes"]],
        parser_classes=[ParserClass(**one) for one in document["parser_classes"]],
        option_classes=[OptionClass(**one) for one in document["option_classes"]],
        options_instead=document["options_instead"],
    )
